//! Durations as operators write them: GEP-2257, `1h30m`, `250ms`, `0s`.

use std::time::Duration;

use serde::{Deserialize, Deserializer, Serializer};

/// Not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a duration: write one like 250ms, 10s or 1h30m, without a sign or a fraction")]
pub struct DurationError(String);

const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Reads a duration (GEP-2257): at most four parts of at most five digits, each with its unit of `h`, `m`, `s` or `ms`.
pub fn parse(text: &str) -> Result<Duration, DurationError> {
    let wrong = || DurationError(text.chars().take(40).collect());
    let (mut rest, mut millis) = (text, 0);
    for _ in 0..4 {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, after) = rest.split_at(digits);
        let letters = after.len() - after.trim_start_matches(|c: char| c.is_ascii_lowercase()).len();
        let (unit, after) = after.split_at(letters);
        let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
        if number.len() > 5 {
            return Err(wrong());
        }
        millis += number.parse::<u64>().map_err(|_| wrong())? * factor;
        if after.is_empty() {
            return Ok(Duration::from_millis(millis));
        }
        rest = after;
    }
    Err(wrong())
}

/// Writes what [`parse`] reads. Less than a millisecond is left out; what is longer than 99,999 hours is written as that.
pub fn show(duration: Duration) -> String {
    let mut left = duration.as_millis().min(99_999 * 3_600_000) as u64;
    let mut text = String::new();
    for (unit, factor) in UNITS {
        if left >= factor {
            text.push_str(&format!("{}{unit}", left / factor));
            left %= factor;
        }
    }
    if text.is_empty() { "0s".to_string() } else { text }
}

/// For `#[serde(with = "duration")]`.
pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&show(*duration))
}

/// For `#[serde(with = "duration")]`.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    parse(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

/// For `#[serde(with = "duration::option")]`.
pub mod option {
    use super::{Deserialize, Deserializer, Duration, Serializer, parse, show};

    /// `None` is null.
    pub fn serialize<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        match duration {
            Some(duration) => serializer.serialize_some(&show(*duration)),
            None => serializer.serialize_none(),
        }
    }

    /// Null is `None`.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| parse(&text)).transpose().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_gateway_api_takes_is_a_duration_and_nothing_else_is() {
        let good = [("0s", 0), ("1h", 3_600_000), ("1h30m10s5ms", 5_410_005), ("250ms", 250), ("10s500ms", 10_500)];
        for (text, millis) in good {
            assert_eq!(parse(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "1", "s", "-1s", "1.5s", "1d", "100000s", "1h1m1s1ms1s", "1 s", "1S", "１s"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_written_reads_as_what_it_was() {
        for millis in [0, 1, 999, 1_000, 61_001, 3_600_000, 86_399_999] {
            let duration = Duration::from_millis(millis);
            assert_eq!(parse(&show(duration)), Ok(duration));
        }
        assert!(parse(&show(Duration::MAX)).is_ok());
    }
}
