//! How much may be under way at once, and how much in which time.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Unusable, duration};

/// `connectionPool`. What is not said is as it is without a policy; each proxy counts for itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ConnectionPool {
    /// Of connections of any kind.
    #[serde(skip_serializing_if = "TcpPool::is_default")]
    pub tcp: TcpPool,
    /// Of requests.
    #[serde(skip_serializing_if = "HttpPool::is_default")]
    pub http: HttpPool,
}

/// `connectionPool.tcp`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct TcpPool {
    /// Connections at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
    /// For a connection to be there, TLS included.
    #[serde(with = "duration::option", skip_serializing_if = "Option::is_none")]
    pub connect_timeout: Option<Duration>,
    /// For so long nothing may move on an opaque connection; zero is for ever.
    #[serde(with = "duration::option", skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<Duration>,
}

/// `connectionPool.http`. The names are Istio's; each limit holds for HTTP/1.1, HTTP/2 and gRPC alike.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct HttpPool {
    /// Requests that wait for a connection at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http1_max_pending_requests: Option<u32>,
    /// Requests under way at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http2_max_requests: Option<u32>,
    /// Requests on one connection before it is replaced; 0 is any number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_requests_per_connection: Option<u32>,
    /// Retries under way at once; 0 is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_retries: Option<u32>,
    /// A connection without a request ends after so long; zero is never.
    #[serde(with = "duration::option", skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<Duration>,
}

impl TcpPool {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl HttpPool {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl ConnectionPool {
    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        let needed = [
            ("tcp.maxConnections", self.tcp.max_connections),
            ("http.http1MaxPendingRequests", self.http.http1_max_pending_requests),
            ("http.http2MaxRequests", self.http.http2_max_requests),
        ];
        if self.tcp.connect_timeout.is_some_and(|time| time < Duration::from_millis(1)) {
            let reason = "no connection is made in no time: write 1ms or more, or leave it out";
            return Err(Unusable::new("connectionPool.tcp.connectTimeout", reason));
        }
        match needed.into_iter().find(|(_, limit)| *limit == Some(0)) {
            Some((field, _)) => Err(Unusable::new(
                format!("connectionPool.{field}"),
                "with 0 nothing would ever pass: write 1 or more, or leave it out",
            )),
            None => Ok(()),
        }
    }
}

/// What a TrafficLimit says: of a service to the proxies beside it, of a route to the callers' proxies. Each proxy counts
/// for itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct TrafficLimits {
    /// How many requests in which time; each of them must be kept.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rates: Vec<RateLimit>,
    /// How many requests at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<Concurrency>,
}

/// A token bucket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RateLimit {
    /// Whose bucket it is: what stays the same while its numbers do is not filled anew.
    pub name: Arc<str>,
    /// Tokens that come back in each interval; a request takes one.
    pub requests: u32,
    /// The interval.
    #[serde(with = "duration")]
    pub interval: Duration,
    /// Tokens that the bucket holds; as many as `requests` unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<u32>,
    /// Who has a bucket of their own.
    #[serde(default, skip_serializing_if = "ForEach::is_everybody")]
    pub for_each: ForEach,
}

/// Who has a bucket of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ForEach {
    /// Nobody: there is one for all.
    #[default]
    Everybody,
    /// Every identity that calls; those without one share one.
    Caller,
    /// Every value of a header, its name in lower case; requests without it share one.
    Header(Arc<str>),
}

/// Requests at once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Concurrency {
    /// At once, until the last byte of their answers.
    pub max_requests: u32,
    /// Of a service, further ones that wait for their turn: none unless said. Of a route, those of its requests that wait
    /// for a connection: any number unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_pending: Option<u32>,
    /// Of a route, retries under way: any number unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_retries: Option<u32>,
    /// How long one waits at most.
    #[serde(with = "duration", default = "a_second")]
    pub pending_timeout: Duration,
    /// How long a caller may keep the app waiting, and a stream stand still: 30 s unless said, and zero is for ever.
    #[serde(default, with = "duration::option", skip_serializing_if = "Option::is_none")]
    pub stall_timeout: Option<Duration>,
    /// Paths that are never held up, such as those of health checks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exempt_paths: Vec<Arc<str>>,
}

fn a_second() -> Duration {
    Duration::from_secs(1)
}

impl Concurrency {
    /// How long a caller may keep the app waiting, and a stream stand still; zero is for ever.
    pub fn stall_timeout(&self) -> Duration {
        self.stall_timeout.unwrap_or(Duration::from_secs(30))
    }
}

impl ForEach {
    fn is_everybody(&self) -> bool {
        *self == Self::Everybody
    }
}

impl RateLimit {
    /// Tokens that the bucket holds.
    pub fn burst(&self) -> u32 {
        self.burst.unwrap_or(self.requests)
    }

    fn check(&self) -> Result<(), (&'static str, &'static str)> {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        if self.requests == 0 {
            return Err(("requests", "with 0 nothing would ever pass: write 1 or more"));
        }
        if self.burst == Some(0) {
            return Err(("burst", "with 0 nothing would ever pass: write 1 or more"));
        }
        if self.interval.is_zero() || self.interval > DAY {
            return Err(("interval", "it is between 1ms and 24h"));
        }
        // A bucket that fills within three years is counted in nanoseconds without an overflow.
        let fills = self.interval.as_nanos() / u128::from(self.requests) * u128::from(self.burst());
        if fills > 100_000_000_000_000_000 {
            return Err(("burst", "the bucket would take years to fill: write less, or a shorter interval"));
        }
        // One token a nanosecond is the finest there is.
        if self.interval.as_nanos() < u128::from(self.requests) {
            return Err(("requests", "more than one in a nanosecond: write fewer, or a longer interval"));
        }
        Ok(())
    }
}

impl TrafficLimits {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// What both of them want: all rates, and the narrower concurrency.
    pub fn and(mut self, other: &Self) -> Self {
        self.rates.extend(other.rates.iter().cloned());
        let narrower = [self.concurrency.take(), other.concurrency.clone()];
        self.concurrency = narrower.into_iter().flatten().min_by_key(|one| one.max_requests);
        self
    }

    /// The same of a route, where what is not said is no limit.
    pub fn and_of_route(self, other: &Self) -> Self {
        let least = |of: fn(&Concurrency) -> Option<u32>| {
            [&self, other].into_iter().filter_map(|limits| of(limits.concurrency.as_ref()?)).min()
        };
        let (pending, retries) = (least(|one| one.max_pending), least(|one| one.max_retries));
        let mut both = self.and(other);
        if let Some(concurrency) = &mut both.concurrency {
            (concurrency.max_pending, concurrency.max_retries) = (pending, retries);
        }
        both
    }

    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        for (number, rate) in self.rates.iter().enumerate() {
            rate.check().map_err(|(field, reason)| Unusable::new(format!("rates[{number}].{field}"), reason))?;
        }
        match &self.concurrency {
            Some(concurrency) if concurrency.max_requests == 0 => {
                Err(Unusable::new("concurrency.maxRequests", "with 0 nothing would ever pass: write 1 or more"))
            }
            Some(concurrency) if concurrency.max_pending > Some(0) && concurrency.pending_timeout.is_zero() => {
                Err(Unusable::new("concurrency.pendingTimeout", "nobody can wait for no time: write 10ms or more"))
            }
            _ => Ok(()),
        }
    }

    /// Whether callers' proxies can obey it for a route; if not, the field and the reason.
    pub fn check_of_route(&self) -> Result<(), Unusable> {
        if let Some(number) = self.rates.iter().position(|rate| rate.for_each == ForEach::Caller) {
            let why = "a route's limit is kept by each caller's proxy, which has one caller: target the Service";
            return Err(Unusable::new(format!("rates[{number}].forEach"), why));
        }
        match &self.concurrency {
            Some(of) if of.max_pending == Some(0) => Err(Unusable::new(
                "concurrency.maxPending",
                "a route's request that waits for no connection never has one: write 1 or more, or leave it out",
            )),
            Some(of) if !of.exempt_paths.is_empty() => Err(Unusable::new(
                "concurrency.exemptPaths",
                "a route has its own matches: take it out, and write another route for these paths",
            )),
            Some(of) if of.stall_timeout.is_some() => Err(Unusable::new(
                "concurrency.stallTimeout",
                "it gives back room at the app, of which a caller's proxy knows nothing: take it out, or target the Service",
            )),
            _ => Ok(()),
        }
    }

    /// Whether the proxies beside a service can obey it; if not, the field and the reason.
    pub fn check_of_service(&self) -> Result<(), Unusable> {
        match &self.concurrency {
            Some(of) if of.max_retries.is_some() => Err(Unusable::new(
                "concurrency.maxRetries",
                "callers' proxies retry, and not those beside the service: target a route, or write a BackendPolicy's \
                 connectionPool.http.maxRetries",
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_policies_about_a_route_the_narrower_number_holds_for_each_of_its_limits() {
        let of = |pending, retries, requests| TrafficLimits {
            concurrency: serde_json::from_value(serde_json::json!({
                "maxRequests": requests, "maxPending": pending, "maxRetries": retries,
            }))
            .unwrap(),
            ..TrafficLimits::default()
        };
        let both = |one: &TrafficLimits, other: &TrafficLimits| {
            let both = TrafficLimits::default().and_of_route(one).and_of_route(other).concurrency.unwrap();
            (both.max_requests, both.max_pending, both.max_retries)
        };
        let (one, other) = (of(Some(9), None, 5), of(Some(3), Some(0), 7));
        assert_eq!(both(&one, &other), (5, Some(3), Some(0)));
        assert_eq!(both(&other, &one), (5, Some(3), Some(0)));
        assert_eq!(both(&of(None, None, 1), &of(None, None, 1)), (1, None, None));
        assert_eq!(both(&one, &TrafficLimits::default()), (5, Some(9), None));
    }
}
