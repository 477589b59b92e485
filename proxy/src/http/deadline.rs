//! When a request is over, whatever came of it: by its caller's word (`grpc-timeout`, or [`EXPECTED`] of any other
//! request), or by its route's. Honoured here to the last byte, and told to the next hop as what is left of it.

use std::fmt;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;

use super::known::Known;
use crate::telemetry::Counter;

/// gRPC over HTTP/2, "Requests".
pub(super) const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// What Envoy tells the next hop, in milliseconds; 0 is none.
pub const EXPECTED: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");
/// `TimeoutValue` has at most 8 digits.
const MOST: u128 = 99_999_999;

/// A moment at which a request is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    at: Instant,
    set_by: SetBy,
    /// It ends as gRPC calls end.
    grpc: bool,
}

/// Who set a deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetBy {
    /// The caller, with `grpc-timeout`.
    GrpcTimeout,
    /// The caller, with [`EXPECTED`].
    Expected,
    /// The route, with `timeouts.request`.
    Route,
}

impl SetBy {
    /// What counts how often it has passed.
    pub fn counter(self) -> Counter {
        match self {
            Self::GrpcTimeout | Self::Expected => Counter::TimeoutCaller,
            Self::Route => Counter::TimeoutRequest,
        }
    }
}

impl fmt::Display for SetBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GrpcTimeout => "the deadline set by grpc-timeout",
            Self::Expected => "the deadline set by x-envoy-expected-rq-timeout-ms",
            Self::Route => "the time that the route gives a request (timeouts.request)",
        })
    }
}

impl Deadline {
    /// That of a request which came just now, if its caller set one. One that cannot be read is the next hop's to refuse.
    pub fn of(headers: &HeaderMap, known: Known) -> Option<Self> {
        if !known.has(Known::DEADLINE) {
            return None;
        }
        let grpc = known.has(Known::GRPC);
        let timeout = headers.get(GRPC_TIMEOUT).filter(|_| grpc).and_then(|value| parse(value.to_str().ok()?));
        let expected = headers.get(EXPECTED).and_then(|value| value.to_str().ok()?.parse().ok());
        let expected = expected.filter(|millis| *millis > 0).map(Duration::from_millis);
        let (left, set_by) = match (timeout, expected) {
            (None, None) => return None,
            (Some(timeout), expected) if expected.is_none_or(|expected| timeout <= expected) => {
                (timeout, SetBy::GrpcTimeout)
            }
            (_, Some(expected)) => (expected, SetBy::Expected),
            (Some(timeout), None) => (timeout, SetBy::GrpcTimeout),
        };
        // So far away that no clock reaches it: as good as none.
        Some(Self { at: Instant::now().checked_add(left)?, set_by, grpc })
    }

    /// That of a route which gives a request so much time from its arrival.
    pub fn of_route(arrived: std::time::Instant, time: Duration, grpc: bool) -> Option<Self> {
        let at = Instant::from_std(arrived).checked_add(time)?;
        Some(Self { at, set_by: SetBy::Route, grpc })
    }

    /// When.
    pub fn at(self) -> Instant {
        self.at
    }

    /// Who set it.
    pub fn set_by(self) -> SetBy {
        self.set_by
    }

    /// Whether it is that of a gRPC call, which can end with a status in the middle of its answer.
    pub fn is_grpc(self) -> bool {
        self.grpc
    }

    /// How long until then.
    pub fn left(self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// Whether so little is left that the next hop, which counts in milliseconds on a clock of its own, may see it pass first.
    pub fn is_near(self) -> bool {
        const NEAR: Duration = Duration::from_millis(20);
        self.left() <= NEAR
    }

    /// Tells the next hop what is left.
    pub fn tell(self, headers: &mut HeaderMap) {
        let left = self.left();
        if let Some(value) = self.grpc.then(|| HeaderValue::try_from(format(left)).ok()).flatten() {
            headers.insert(GRPC_TIMEOUT, value);
        }
        if !self.grpc || headers.contains_key(EXPECTED) {
            // Rounded up, since 0 is none, and so that the first to see its end is whoever set it.
            let millis = left.as_nanos().div_ceil(1_000_000).clamp(1, MOST);
            headers.insert(EXPECTED, HeaderValue::from(millis as u64));
        }
    }
}

fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

/// In the finest unit that has room. Rounded down: the next hop must not wait longer than we do.
fn format(left: Duration) -> String {
    let units = [(left.as_nanos(), "n"), (left.as_micros(), "u"), (left.as_millis(), "m")];
    let seconds = u128::from(left.as_secs());
    let coarse = [(seconds, "S"), (seconds / 60, "M"), (seconds / 3600, "H")];
    let fits = units.into_iter().chain(coarse).find(|(value, _)| *value <= MOST);
    let (value, unit) = fits.unwrap_or((MOST, "H"));
    format!("{value}{unit}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(headers: &HeaderMap) -> Option<Deadline> {
        Deadline::of(headers, Known::of(headers))
    }

    #[test]
    fn every_unit_is_read_and_what_is_none_is_not() {
        for (text, millis) in [("1H", 3_600_000), ("2M", 120_000), ("3S", 3_000), ("250m", 250), ("5000u", 5)] {
            assert_eq!(parse(text), Some(Duration::from_millis(millis)), "{text}");
        }
        assert_eq!(parse("99999999n"), Some(Duration::from_nanos(99_999_999)));
        for text in ["", "S", "1", "1s", "-1S", "+1S", "123456789m", "1.5S", "1 S", "1é"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    fn headers(named: &[(&'static str, &'static str)]) -> HeaderMap {
        named.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    const GRPC: (&str, &str) = ("content-type", "application/grpc+proto");

    #[test]
    fn grpc_timeout_is_heeded_of_grpc_calls_alone() {
        assert_eq!(of(&headers(&[("grpc-timeout", "1S")])), None);
        assert!(of(&headers(&[("grpc-timeout", "1S"), GRPC])).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_deadlines_the_sooner_holds() {
        let of = |timeout, expected| {
            let all = headers(&[("grpc-timeout", timeout), ("x-envoy-expected-rq-timeout-ms", expected), GRPC]);
            of(&all).map(|deadline| (deadline.set_by(), deadline.left().as_millis()))
        };
        assert_eq!(of("1S", "2000"), Some((SetBy::GrpcTimeout, 1000)));
        assert_eq!(of("3S", "2000"), Some((SetBy::Expected, 2000)));
        assert_eq!(of("3S", "0"), Some((SetBy::GrpcTimeout, 3000)));
        assert_eq!(of("x", "soon"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_hop_is_told_what_is_left() {
        let mut told = headers(&[("grpc-timeout", "3S"), GRPC]);
        let deadline = of(&told).unwrap();
        tokio::time::advance(Duration::from_millis(1_200)).await;
        deadline.tell(&mut told);
        assert_eq!(told[GRPC_TIMEOUT], "1800000u");
        assert!(!told.contains_key(EXPECTED));
        tokio::time::advance(Duration::from_secs(5)).await;
        deadline.tell(&mut told);
        assert_eq!(told[GRPC_TIMEOUT], "0n");

        let mut told = headers(&[("x-envoy-expected-rq-timeout-ms", "3000")]);
        let deadline = of(&told).unwrap();
        tokio::time::advance(Duration::from_micros(1_200_500)).await;
        deadline.tell(&mut told);
        assert_eq!(told[EXPECTED], "1800");
        tokio::time::advance(Duration::from_secs(5)).await;
        deadline.tell(&mut told);
        // Not 0, which would be no deadline at all.
        assert_eq!(told[EXPECTED], "1");
    }

    proptest! {
        // Each unit comes up: few of all numbers of 64 bits are small.
        #[test]
        fn what_is_told_is_never_more_than_what_is_left_and_loses_little(nanos in any::<u64>(), bits in 0..64) {
            let left = Duration::from_nanos(nanos >> bits);
            let text = format(left);
            let told = parse(&text).unwrap();
            prop_assert!(told <= left && text.len() <= 9);
            // What has no room in a unit is 100,000 of the next at least, and less than one of those is lost.
            prop_assert!(left - told <= left / 100_000, "{left:?} {text}");
        }
    }
}
