//! An endpoint that was picked for a request. What came of it is reported once, when the lease is dropped.

use std::sync::Arc;
use std::time::Instant;

use super::{DialError, EndpointState};
use crate::telemetry::{Counter, Telemetry};
use crate::traffic::outlier::{Detection, Floor, Outcome, Reason};

/// The use of an endpoint. Dropped without a word, it says nothing of the endpoint: the caller gave up.
pub struct Lease {
    /// Whose.
    pub endpoint: Arc<EndpointState>,
    /// Who hears of it; nobody ejects the app, or what is no part of the mesh.
    judge: Option<Judge>,
    probe: bool,
    outcome: Outcome,
}

struct Judge {
    floor: Arc<Floor>,
    telemetry: Arc<Telemetry>,
    epoch: Instant,
}

impl Lease {
    /// Of one that is alone, and used whatever it does.
    pub(crate) fn alone(endpoint: Arc<EndpointState>) -> Self {
        Self { endpoint, judge: None, probe: false, outcome: Outcome::Unknown }
    }

    /// Of a pick among endpoints that may be ejected.
    pub(crate) fn of(
        endpoint: Arc<EndpointState>,
        probe: bool,
        floor: &Arc<Floor>,
        epoch: Instant,
        telemetry: &Arc<Telemetry>,
    ) -> Self {
        let judge = Judge { floor: Arc::clone(floor), telemetry: Arc::clone(telemetry), epoch };
        Self { endpoint, judge: Some(judge), probe, outcome: Outcome::Unknown }
    }

    /// The endpoint did what was asked of it, or said that the caller is wrong.
    pub(crate) fn good(&mut self) {
        self.outcome = Outcome::Good;
    }

    /// A connection to it was made, or not.
    pub(crate) fn connected<T>(&mut self, outcome: &Result<T, DialError>) {
        match outcome {
            Ok(_) => self.good(),
            // What we refused ourselves says nothing of it.
            Err(error) if error.counter().is_some() => {}
            Err(_) => self.bad(),
        }
    }

    /// The endpoint failed.
    pub(crate) fn bad(&mut self) {
        self.outcome = Outcome::Bad;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(Judge { floor, telemetry, epoch }) = &self.judge else { return };
        let (endpoint, now) = (&self.endpoint, epoch.elapsed());
        let ejected = floor.report(&endpoint.vitals, self.probe, self.outcome, &Detection::DEFAULT, now, rand::random);
        let Some(reason) = ejected else { return };
        telemetry.count(match reason {
            Reason::Consecutive => Counter::EjectedConsecutive,
            Reason::SuccessRate => Counter::EjectedSuccessRate,
            Reason::Probe => Counter::EjectedProbe,
        });
        tracing::warn!(endpoint = %endpoint.place, ?reason, period = ?endpoint.vitals.period(), "ejected an endpoint");
    }
}
