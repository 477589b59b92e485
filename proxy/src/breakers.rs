//! `/breakers`: which endpoints are serving, ejected or probing, why, since when, and when they are tried next; and the
//! circuit breakers of whole destinations.

mod operator;
mod watch;

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use sheetbend_certs::format_time;
use sheetbend_control_plane_client::model::duration;

use crate::traffic::breaker::{Circuit, Shown};
use crate::traffic::outlier::{Reason, State, Turn};
use crate::upstream::{EndpointState, Endpoints};

pub(crate) use operator::obey;
pub(crate) use watch::Watchers;

/// All endpoints of the mesh that this proxy uses, in the order of their names.
pub(crate) fn document(endpoints: &Endpoints) -> Value {
    let now = endpoints.epoch.elapsed();
    let clock = Clock::at(now);
    let mut all: Vec<_> = endpoints.of_backends();
    all.sort_by_cached_key(|endpoint| (endpoint.backend().cloned(), endpoint.place.to_string()));
    let shown: Vec<Value> = all.iter().map(|endpoint| endpoint_as_json(endpoint, &clock)).collect();
    let mut circuits = endpoints.circuits(now);
    circuits.sort_by(|a, b| a.0.cmp(&b.0));
    let circuits: Vec<Value> = circuits.iter().map(|(backend, one)| circuit_as_json(backend, one, &clock)).collect();
    json!({ "endpoints": shown, "circuit_breakers": circuits })
}

/// Turns times of the proxy's own clock into those of the wall.
struct Clock {
    now: Duration,
    wall: SystemTime,
}

impl Clock {
    fn at(now: Duration) -> Self {
        Self { now, wall: SystemTime::now() }
    }

    fn time(&self, at: Duration) -> String {
        let wall = if at > self.now { self.wall + (at - self.now) } else { self.wall - (self.now - at) };
        format_time(wall)
    }
}

fn endpoint_as_json(endpoint: &EndpointState, clock: &Clock) -> Value {
    let vitals = &endpoint.vitals;
    let history = vitals.history();
    let detection = endpoint.detection();
    let (requests, failures) = vitals.recent(detection.interval, clock.now);
    let in_a_row = vitals.in_a_row();
    let last = history.last();
    let until = match vitals.state() {
        // Nobody knows when it will be well.
        state if state.is_until_well() => None,
        State::Ejected { until } => Some(clock.time(until)),
        State::Serving | State::Probing | State::Ramping { .. } => None,
    };
    let reason = history.iter().rev().find_map(|turn| turn.reason).filter(|_| vitals.state() != State::Serving);
    let turn = |turn: &Turn| json!({ "at": clock.time(turn.at), "state": name(turn.state), "reason": turn.reason.map(Reason::word) });
    json!({
        "backend": endpoint.backend(),
        "endpoint": endpoint.place.to_string(),
        "identity": endpoint.identity().map(ToString::to_string),
        "state": name(vitals.state()),
        "reason": reason.map(Reason::word),
        "since": last.map(|turn| clock.time(turn.at)),
        "next_probe": until,
        "held_until": Some(vitals.spared()).filter(|until| *until > clock.now).map(|until| clock.time(until)),
        "consecutive_failures": in_a_row.errors,
        "consecutive_gateway_errors": in_a_row.gateway_errors,
        "consecutive_local_origin_failures": in_a_row.local_failures,
        "requests": requests,
        "failures": failures,
        "interval": duration::show(detection.interval),
        "in_flight": vitals.load.in_flight(),
        "history": history.iter().map(turn).collect::<Vec<_>>(),
    })
}

fn circuit_as_json(backend: &str, breaker: &Shown, clock: &Clock) -> Value {
    let next_trial = breaker.circuit.next_trial().map(|until| clock.time(until));
    let turn = |(at, circuit): &(Duration, Circuit)| json!({ "at": clock.time(*at), "state": circuit_name(*circuit) });
    json!({
        "backend": backend,
        "state": circuit_name(breaker.circuit),
        "since": breaker.history.last().map(|(at, _)| clock.time(*at)),
        "next_trial": next_trial,
        "failures": breaker.failures,
        "opened": breaker.opened,
        "rejected": breaker.rejected,
        "policy": breaker.policy,
        "history": breaker.history.iter().map(turn).collect::<Vec<_>>(),
    })
}

fn circuit_name(circuit: Circuit) -> &'static str {
    match circuit {
        Circuit::Closed => "Closed",
        Circuit::Open { .. } => "Open",
        Circuit::HalfOpen { .. } => "HalfOpen",
    }
}

/// The three that an operator knows: one whose share grows is being tried still.
pub(crate) fn name(state: State) -> &'static str {
    match state {
        State::Serving => "Serving",
        State::Ejected { .. } => "Ejected",
        State::Probing | State::Ramping { .. } => "Probing",
    }
}
