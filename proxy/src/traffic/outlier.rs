//! PURE: which endpoints are left alone for a while, and how they come back. Envoy calls it outlier detection.
//!
//! An endpoint is `Serving`, `Ejected` until a moment, or `Probing`: one request at a time, then a growing share of them.
//! [`Floor`] holds all endpoints of one backend: what is serving or probing never falls below half of them, of all levels
//! together, and where most fail at once, the cause is a common one and nobody more is ejected for it.
//!
//! The balancer keeps away from whoever has just failed, and so would seldom learn more of it. Such an endpoint is asked
//! on purpose, by one request at a time that may be sent again, until it has answered well or is ejected. Most requests go
//! to the others meanwhile: they tell whether it is alone with its failures.
//!
//! Reading is free of locks, and so is whatever goes well. Turning from one state into another takes the floor's lock, so
//! that two workers never both take the last place below it.

mod detection;
mod floor;
#[cfg(test)]
mod policy_tests;
#[cfg(test)]
mod tests;
mod vitals;

use std::time::Duration;

pub use detection::{Against, Detection};
pub use floor::{Floor, NotEjected};
pub use vitals::{InARow, Vitals};

/// How an endpoint is used. Times are on the caller's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// As the balancer likes.
    Serving,
    /// Not at all, until then.
    Ejected {
        /// When it may be tried again.
        until: Duration,
    },
    /// One request at a time, to see.
    Probing,
    /// A share of what it would get that has grown since then.
    Ramping {
        /// When the first probe came back well.
        since: Duration,
    },
}

impl State {
    /// The kind in the two lowest bits: nobody misses four nanoseconds.
    fn pack(self) -> u64 {
        let (kind, at) = match self {
            Self::Serving => (0, Duration::ZERO),
            Self::Ejected { until } => (1, until),
            Self::Probing => (2, Duration::ZERO),
            Self::Ramping { since } => (3, since),
        };
        (at.as_nanos() as u64 & !3) | kind
    }

    fn unpack(packed: u64) -> Self {
        let at = Duration::from_nanos(packed & !3);
        match packed & 3 {
            0 => Self::Serving,
            1 => Self::Ejected { until: at },
            2 => Self::Probing,
            _ => Self::Ramping { since: at },
        }
    }
}

/// What a request said about the endpoint that it was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was answered, be it to say that the caller is wrong.
    Good,
    /// The endpoint failed.
    Bad(Fault),
    /// Nothing: the caller gave up, or we refused the request ourselves.
    Unknown,
}

/// How an endpoint failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It answered with an error of its own.
    Answer,
    /// It answered as a gateway does: 502, 503, 504.
    Gateway,
    /// No answer came: no connection, a reset, a timeout.
    LocalOrigin,
}

/// Why an endpoint is ejected, or no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Failures in a row.
    Errors,
    /// 502, 503 and 504 in a row.
    GatewayErrors,
    /// Failures without an answer in a row.
    LocalFailures,
    /// Too small a share of requests went well.
    SuccessRate,
    /// A smaller one than those of the others.
    Deviation,
    /// Too large a share of requests failed.
    FailureShare,
    /// It was tried again, and failed again.
    Probe,
    /// An operator said so.
    Operator,
    /// It fails its health checks.
    HealthCheck,
}

impl Reason {
    /// All of them, in the order of [`Tally::ejections`].
    pub const ALL: [Self; 9] = [
        Self::Errors,
        Self::GatewayErrors,
        Self::LocalFailures,
        Self::SuccessRate,
        Self::Deviation,
        Self::FailureShare,
        Self::Probe,
        Self::Operator,
        Self::HealthCheck,
    ];

    /// What an operator reads, on `/breakers` and as a metric's label.
    pub fn word(self) -> &'static str {
        match self {
            Self::Errors => "consecutive_failures",
            Self::GatewayErrors => "consecutive_gateway_errors",
            Self::LocalFailures => "consecutive_local_origin_failures",
            Self::SuccessRate => "success_rate",
            Self::Deviation => "success_rate_deviation",
            Self::FailureShare => "failure_percentage",
            Self::Probe => "probe_failed",
            Self::Operator => "operator",
            Self::HealthCheck => "health_check",
        }
    }
}

/// A turn from one state into another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// When.
    pub at: Duration,
    /// Into what.
    pub state: State,
    /// Why, where it was ejected for its own sake.
    pub reason: Option<Reason>,
}

/// A place that was picked, and whether the request is a probe of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Picked {
    /// Its number among the endpoints.
    pub at: usize,
    /// To be handed back with what came of it.
    pub probe: bool,
}

/// Who sent a request to an endpoint, for when something is heard of it.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// It was a probe.
    pub probe: bool,
    /// [`Vitals::turns`] at that time.
    pub turn: u32,
    /// When.
    pub at: Duration,
}

/// How often what was decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Ejections, by [`Reason`].
    pub ejections: [u64; Reason::ALL.len()],
    /// Endpoints that would have been ejected, had enough others been left.
    pub floor: u64,
    /// The same, had not most failed at once.
    pub common_cause: u64,
    /// Circuit breakers that opened.
    pub opened: u64,
}

impl Tally {
    fn ejected(&mut self, reason: Reason) {
        self.ejections[reason as usize] += 1;
    }
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.ejections.iter_mut().zip(other.ejections).for_each(|(all, more)| *all += more);
        self.floor += other.floor;
        self.common_cause += other.common_cause;
        self.opened += other.opened;
    }
}
