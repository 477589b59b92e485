//! The deadline that a gRPC caller sets (`grpc-timeout`, gRPC over HTTP/2, "Requests"): honoured here, and told to the next
//! hop as what is left of it.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;

use super::headers::is_grpc;

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// `TimeoutValue` has at most 8 digits.
const MOST: u128 = 99_999_999;

/// A moment at which a call is over, whatever came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline(Instant);

impl Deadline {
    /// That of a gRPC call which came just now, if it has one. One that cannot be read is the next hop's to refuse.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let timeout = headers.get(GRPC_TIMEOUT).filter(|_| is_grpc(headers))?;
        Some(Self(Instant::now() + parse(timeout.to_str().ok()?)?))
    }

    /// When.
    pub fn at(self) -> Instant {
        self.0
    }

    /// How long until then.
    pub fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Tells the next hop what is left.
    pub fn tell(self, headers: &mut HeaderMap) {
        if let Ok(value) = HeaderValue::try_from(format(self.left())) {
            headers.insert(GRPC_TIMEOUT, value);
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

    #[test]
    fn only_a_grpc_call_has_a_deadline() {
        let mut headers = HeaderMap::new();
        headers.insert(GRPC_TIMEOUT, HeaderValue::from_static("1S"));
        assert_eq!(Deadline::of(&headers), None);
        headers.insert("content-type", HeaderValue::from_static("application/grpc+proto"));
        assert!(Deadline::of(&headers).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_hop_is_told_what_is_left() {
        let mut headers = HeaderMap::new();
        headers.insert(GRPC_TIMEOUT, HeaderValue::from_static("3S"));
        headers.insert("content-type", HeaderValue::from_static("application/grpc"));
        let deadline = Deadline::of(&headers).unwrap();
        tokio::time::advance(Duration::from_millis(1_200)).await;
        deadline.tell(&mut headers);
        assert_eq!(headers[GRPC_TIMEOUT], "1800000u");
        tokio::time::advance(Duration::from_secs(5)).await;
        deadline.tell(&mut headers);
        assert_eq!(headers[GRPC_TIMEOUT], "0n");
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
