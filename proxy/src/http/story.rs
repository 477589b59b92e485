//! What is decided for a request on its way, kept compact: most requests are never told. What allocates is made when an
//! attempt failed, or for the few successes that are kept.

use std::sync::Arc;
use std::time::Duration;

use http::Response;
use serde_json::{Value, json};
use sheetbend_control_plane_client::model::{Rule, RulePolicy, Target};

use super::body::ResponseBody;
use super::error::Error;
use crate::traffic::retry::Verdict;
use crate::upstream::EndpointState;

/// How a request came to this proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caught {
    /// Its connection was redirected by the kernel; the original destination is the target.
    Redirected,
    /// The app uses this proxy by name (`http_proxy`).
    Explicit,
    /// Within a tunnel that the app asked for (`CONNECT`).
    Tunnel,
    /// Over a local port that leads to one destination.
    LocalPort,
    /// From another proxy of the mesh, by mutual TLS.
    Peer,
    /// From a caller with a certificate of the mesh that is no proxy of ours.
    MutualTls,
    /// From a caller without an identity.
    Plain,
}

impl Caught {
    fn words(self) -> &'static str {
        match self {
            Self::Redirected => "redirected on its way to the target",
            Self::Explicit => "sent to this proxy by the app (http_proxy)",
            Self::Tunnel => "within a CONNECT tunnel",
            Self::LocalPort => "on a local port that leads to the target",
            Self::Peer => "from a proxy of the mesh, by mutual TLS",
            Self::MutualTls => "by mutual TLS",
            Self::Plain => "in plain",
        }
    }
}

/// The decisions made for one request.
pub struct Story {
    /// It is told even if all goes well.
    kept: bool,
    caught: Option<Caught>,
    target: Option<Target>,
    rule: Option<(Arc<str>, Arc<RulePolicy>)>,
    /// When the attempt began, on the endpoints' clock.
    began: Option<Duration>,
    /// Whether the attempt's connection was there before.
    reused: Option<bool>,
    tale: Option<Box<Tale>>,
}

/// What is told, as far as it is known.
#[derive(Default)]
struct Tale {
    /// Who could have been picked for the attempt that is under way.
    candidates: Option<Value>,
    attempts: Vec<Value>,
}

impl Story {
    /// Of a request that is told in any case, or only if it fails.
    pub fn new(kept: bool) -> Self {
        Self { kept, caught: None, target: None, rule: None, began: None, reused: None, tale: None }
    }

    /// Whether it is told even if all goes well.
    pub fn is_kept(&self) -> bool {
        self.kept
    }

    /// How it came.
    pub fn caught(&mut self, how: Caught) {
        self.caught = Some(how);
    }

    /// Whom it is for, and the rule that takes it.
    pub fn routed(&mut self, target: &Target, rule: Option<&Rule>) {
        self.target = Some(target.clone());
        self.rule = rule.map(|rule| (Arc::clone(&rule.name), Arc::clone(&rule.policy)));
    }

    /// An endpoint is about to be picked.
    pub fn picking(&mut self, now: Duration, candidates: impl FnOnce() -> Value) {
        self.began = Some(now);
        self.reused = None;
        if self.kept {
            self.tale.get_or_insert_default().candidates = Some(seen(candidates(), "at the pick"));
        }
    }

    /// None could be picked.
    #[cold]
    pub fn nobody(&mut self, candidates: impl FnOnce() -> Value) {
        let tale = self.tale.get_or_insert_default();
        let found = tale.candidates.take().unwrap_or_else(|| seen(candidates(), "at the pick"));
        tale.attempts.push(json!({ "candidates": found, "endpoint": null, "outcome": "nobody to ask" }));
    }

    /// Whether the connection was there before.
    pub fn over(&mut self, reused: Option<bool>) {
        self.reused = reused;
    }

    /// The attempt has an outcome, and it was decided whether to make another. `candidates` are asked for only when that is
    /// told.
    pub fn tried(
        &mut self,
        endpoint: &EndpointState,
        verdict: Option<&Verdict>,
        result: &Result<Response<ResponseBody>, Error>,
        candidates: impl FnOnce() -> Value,
    ) {
        let failed = !matches!(result, Ok(answer) if !answer.status().is_server_error());
        if self.kept || failed || verdict.is_some() {
            let outcome = match result {
                Ok(answer) => format!("status {}", answer.status().as_u16()),
                Err(error) => error.to_string(),
            };
            let took = self.began.map(|began| endpoint.now().saturating_sub(began));
            self.tell(endpoint, verdict, outcome, took, Some(candidates));
        }
    }

    #[cold]
    fn tell(
        &mut self,
        endpoint: &EndpointState,
        verdict: Option<&Verdict>,
        outcome: String,
        took: Option<Duration>,
        candidates: Option<impl FnOnce() -> Value>,
    ) {
        let reused = self.reused;
        let tale = self.tale.get_or_insert_default();
        let found = tale.candidates.take();
        let found = found.or_else(|| candidates.map(|candidates| seen(candidates(), "right after the attempt")));
        tale.attempts.push(json!({
            "candidates": found,
            "endpoint": endpoint.place.to_string(),
            "identity": endpoint.identity().map(ToString::to_string),
            "connection": reused.map(|reused| if reused { "reused" } else { "new" }),
            "outcome": outcome,
            "ms": took.map(millis),
            "retry": verdict.map(|verdict| match verdict {
                Verdict::Retry { after, reason } => json!({
                    "verdict": format!("another attempt, {} ms later", millis(*after)),
                    "reason": reason.reason(),
                }),
                Verdict::GiveUp(reason) => json!({ "verdict": "no other attempt", "reason": reason.reason() }),
            }),
        }));
    }

    /// The end: what is known of the decisions, with the last attempt if it had no outcome of its own.
    #[cold]
    pub fn end(&mut self, attempts: u32, last: Option<&EndpointState>, outcome: String, took: Duration) -> Value {
        let told = self.tale.as_ref().map_or(0, |tale| tale.attempts.len());
        if let Some(endpoint) = last.filter(|_| (told as u64) < u64::from(attempts)) {
            let took = self.began.map_or(took, |began| endpoint.now().saturating_sub(began));
            self.tell(endpoint, None, outcome, Some(took), None::<fn() -> Value>);
        }
        let tale = self.tale.take().unwrap_or_default();
        json!({
            "caught": self.caught.map(Caught::words),
            "target": self.target.as_ref().map(ToString::to_string),
            "rule": self.rule.as_ref().map(|(name, policy)| json!({ "name": &**name, "place": &*policy.place })),
            "attempts": tale.attempts,
        })
    }
}

fn seen(mut candidates: Value, when: &str) -> Value {
    if let Some(fields) = candidates.as_object_mut() {
        fields.insert("seen".to_string(), when.into());
    }
    candidates
}

/// Milliseconds with as many digits as anybody reads.
pub fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 100_000.0).round() / 100.0
}
