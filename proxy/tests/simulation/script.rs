//! What a run is about: who calls how often, and how the servers behave when.

use std::time::Duration;

use sheetbend_control_plane_client::model::{LoadBalancer, Retry};

/// A run, before it is played.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(crate) servers: Vec<Conduct>,
    /// Of each server; where there are fewer, the others are all alike.
    pub(crate) standings: Vec<Standing>,
    /// Each with a proxy of its own.
    pub(crate) callers: Vec<Caller>,
    /// When which server changes its ways.
    pub(crate) changes: Vec<(Duration, usize, Conduct)>,
    /// When the control plane names which servers.
    pub(crate) pushes: Vec<(Duration, Vec<usize>)>,
    /// How long one attempt may take.
    pub(crate) per_try: Option<Duration>,
    /// What the route of all callers wants retried.
    pub(crate) retry: Retry,
    /// Whether endpoints that fail are ejected.
    pub(crate) ejects: bool,
    /// How proxies choose.
    pub(crate) balancer: LoadBalancer,
    /// How long the callers go on asking.
    pub(crate) lasts: Duration,
}

/// How a server stands among the others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    pub(crate) priority: u32,
    pub(crate) weight: u32,
}

impl Default for Standing {
    fn default() -> Self {
        Self { priority: 0, weight: 1 }
    }
}

/// Somebody who asks at random moments, whatever becomes of what was asked before.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// Requests a second.
    pub(crate) rate: f64,
    /// The share of them that may be sent twice.
    pub(crate) idempotent: f64,
    /// How long one answer is waited for.
    pub(crate) patience: Option<Duration>,
}

impl Caller {
    /// Asks for what may be asked for twice, and waits for ever.
    pub(crate) fn at(rate: f64) -> Self {
        Self { rate, idempotent: 1.0, patience: None }
    }
}

/// How a server behaves.
#[derive(Clone, Debug)]
pub(crate) enum Conduct {
    /// It answers: log-normal latency, a share of 503s, so many requests at once and the others one after the other.
    Answers { median: Duration, spread: f64, errors: f64, at_once: usize },
    /// It does what it is asked for, and breaks the connection instead of answering.
    Resets,
    /// Its port is closed.
    Refuses,
    /// It takes requests, and answers none.
    Hangs,
    /// Nothing comes through to it, and nobody says so.
    Silent { since: Duration },
}

impl Conduct {
    /// As one would wish.
    pub(crate) fn good() -> Self {
        Self::Answers { median: Duration::from_millis(5), spread: 0.3, errors: 0.0, at_once: 64 }
    }

    /// Good but for its latency.
    pub(crate) fn slower(by: u32) -> Self {
        Self::Answers { median: Duration::from_millis(5) * by, spread: 0.3, errors: 0.0, at_once: 64 }
    }

    /// Whether it is truly good, or truly bad; what is between may be seen either way.
    pub(crate) fn truly(&self) -> Option<bool> {
        match self {
            Self::Answers { errors, .. } if *errors <= 0.02 => Some(true),
            Self::Answers { errors, .. } if *errors < 0.4 => None,
            Self::Answers { .. } | Self::Resets | Self::Refuses | Self::Hangs | Self::Silent { .. } => Some(false),
        }
    }

    /// How long it takes to see that it is like this. What fails now and then is judged by the share of its failures, in
    /// which for ten seconds there is also what it did before.
    pub(crate) fn seen_within(&self) -> Duration {
        let now_and_then = matches!(self, Self::Answers { errors, .. } if *errors > 0.0 && *errors < 1.0);
        Duration::from_secs(if now_and_then { 10 } else { 2 })
    }

    /// Good but for a share of errors, which come sooner than answers would.
    pub(crate) fn failing(errors: f64) -> Self {
        Self::Answers { median: Duration::from_millis(1), spread: 0.3, errors, at_once: 64 }
    }
}
