//! Counts of one end of an edge: since the start, and over the last minute in slots of 5 s.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Figures, Protocol, buckets};

/// A report comes every 5 s; a slot holds one.
const SLOT: Duration = Duration::from_secs(5);
/// 12 × 5 s: the last minute.
const SLOTS: u64 = 12;

/// What was counted over some stretch of time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Requests that ended.
    pub requests: u64,
    /// Those that failed, and connections that did.
    pub errors: u64,
    /// Bytes from source to destination.
    pub bytes_sent: u64,
    /// Bytes from destination to source.
    pub bytes_received: u64,
    /// Connections opened.
    pub opened: u64,
    /// Connections closed.
    pub closed: u64,
    /// Requests by latency: bucket and count, ordered by bucket, none of them zero.
    pub latency: Vec<(u16, u64)>,
}

impl Totals {
    /// Whether nothing at all was counted.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Adds what was counted elsewhere. Sums stop at the largest number rather than start again at zero.
    pub(super) fn add(&mut self, more: &Self) {
        let sums = [
            (&mut self.requests, more.requests),
            (&mut self.errors, more.errors),
            (&mut self.bytes_sent, more.bytes_sent),
            (&mut self.bytes_received, more.bytes_received),
            (&mut self.opened, more.opened),
            (&mut self.closed, more.closed),
        ];
        for (sum, n) in sums {
            *sum = sum.saturating_add(n);
        }
        for &(bucket, n) in &more.latency {
            match self.latency.binary_search_by_key(&bucket, |(b, _)| *b) {
                Ok(at) => self.latency[at].1 = self.latency[at].1.saturating_add(n),
                Err(at) => self.latency.insert(at, (bucket, n)),
            }
        }
    }

    pub(super) fn figures(&self, protocol: Protocol, over: Duration) -> Figures {
        let mut counts = [0; buckets::COUNT];
        for &(bucket, n) in &self.latency {
            if let Some(count) = counts.get_mut(bucket as usize) {
                *count = n;
            }
        }
        // Opaque connections are counted when they open and fail before they do; requests are counted when they end.
        let (events, tried) = match protocol {
            Protocol::Tcp => (self.opened, self.opened.saturating_add(self.errors)),
            _ => (self.requests, self.requests),
        };
        let seconds = over.as_secs_f64();
        let ratio = |part: u64, whole: f64| if whole > 0.0 { part as f64 / whole } else { 0.0 };
        Figures {
            seconds: round(seconds),
            requests: self.requests,
            connections: self.opened,
            errors: self.errors,
            rate: round(ratio(events, seconds)),
            error_rate: ratio(self.errors, tried as f64).min(1.0),
            p50_ms: buckets::quantile(&counts, 0.50),
            p90_ms: buckets::quantile(&counts, 0.90),
            p99_ms: buckets::quantile(&counts, 0.99),
            bytes_sent: self.bytes_sent,
            bytes_received: self.bytes_received,
        }
    }
}

fn round(x: f64) -> f64 {
    (x * 1000.0).round() / 1000.0
}

/// One end's counts. Times are since the moment from which its owner counts.
#[derive(Debug, Default)]
pub(super) struct Side {
    pub(super) since_start: Totals,
    slots: VecDeque<(u64, Totals)>,
    first: Option<Duration>,
    plain_at: Option<Duration>,
    mtls: bool,
}

impl Side {
    pub(super) fn add(&mut self, now: Duration, delta: &Totals, mtls: bool) {
        self.first.get_or_insert(now);
        match mtls {
            true => self.mtls = true,
            false => self.plain_at = Some(now),
        }
        self.since_start.add(delta);
        let slot = slot(now);
        match self.slots.back_mut() {
            Some((last, totals)) if *last >= slot => totals.add(delta),
            _ => self.slots.push_back((slot, delta.clone())),
        }
        while self.slots.front().is_some_and(|(first, _)| first + SLOTS < slot) {
            self.slots.pop_front();
        }
    }

    /// Whether no plain traffic was seen: in the last minute, or ever if there is mutual TLS at all.
    pub(super) fn mtls(&self, now: Duration) -> bool {
        self.mtls && self.plain_at.is_none_or(|at| now.saturating_sub(at) > SLOT * SLOTS as u32)
    }

    /// The last minute's counts and how long they took, where deltas arrive as they happen.
    pub(super) fn last_minute_live(&self, now: Duration) -> (Totals, Duration) {
        let from = slot(now).saturating_sub(SLOTS - 1);
        let start = (SLOT * u32::try_from(from).unwrap_or(u32::MAX)).max(self.first.unwrap_or(now));
        // A second at least: the first few requests are no rate.
        (self.sum(from, slot(now)), now.saturating_sub(start).max(Duration::from_secs(1)))
    }

    /// The same where every delta tells of the 5 s before it: a slot counts as 5 s as soon as a report is in it.
    pub(super) fn last_minute_reported(&self, now: Duration) -> (Totals, Duration) {
        let current = slot(now);
        let to = match self.slots.back() {
            Some((last, _)) if *last >= current => current,
            _ => current.saturating_sub(1),
        };
        let first = slot(self.first.unwrap_or(now));
        let from = to.saturating_sub(SLOTS - 1).max(first).min(to);
        (self.sum(from, to), SLOT * u32::try_from(to - from + 1).unwrap_or(SLOTS as u32))
    }

    fn sum(&self, from: u64, to: u64) -> Totals {
        let mut sum = Totals::default();
        for (_, totals) in self.slots.iter().filter(|(slot, _)| (from..=to).contains(slot)) {
            sum.add(totals);
        }
        sum
    }
}

fn slot(at: Duration) -> u64 {
    at.as_secs() / SLOT.as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requests(n: u64) -> Totals {
        Totals { requests: n, latency: vec![(100, n)], ..Totals::default() }
    }

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn a_constant_rate_is_told_exactly_whenever_one_asks() {
        let mut side = Side::default();
        for report in 0..40 {
            side.add(at(report as f64 * 5.0 + 2.0), &requests(50), true);
            for later in [0.0, 1.0, 2.9, 3.1, 4.9] {
                let (totals, over) = side.last_minute_reported(at(report as f64 * 5.0 + 2.0 + later));
                assert_eq!(totals.figures(Protocol::Http, over).rate, 10.0, "after report {report} + {later} s");
            }
        }
    }

    #[test]
    fn a_minute_of_silence_leaves_only_what_was_since_the_start() {
        let mut side = Side::default();
        side.add(at(1.0), &requests(50), true);
        assert_eq!(side.last_minute_live(at(50.0)).0.requests, 50);
        assert_eq!(side.last_minute_live(at(66.0)).0, Totals::default());
        assert_eq!(side.last_minute_reported(at(66.0)).0, Totals::default());
        assert_eq!(side.since_start.requests, 50);
    }

    #[test]
    fn the_first_seconds_already_have_a_rate() {
        let mut side = Side::default();
        side.add(at(100.0), &requests(10), true);
        side.add(at(102.0), &requests(10), true);
        let (totals, over) = side.last_minute_live(at(102.0));
        assert_eq!(totals.figures(Protocol::Http, over).rate, 10.0);
    }

    #[test]
    fn one_plain_request_opens_the_lock_for_a_minute() {
        let mut side = Side::default();
        side.add(at(1.0), &requests(1), true);
        assert!(side.mtls(at(1.0)));
        side.add(at(2.0), &requests(1), false);
        side.add(at(3.0), &requests(1), true);
        assert!(!side.mtls(at(3.0)));
        assert!(side.mtls(at(63.0)));
    }

    #[test]
    fn sums_never_wrap() {
        let mut totals = requests(u64::MAX);
        totals.add(&requests(7));
        assert_eq!((totals.requests, totals.latency), (u64::MAX, vec![(100, u64::MAX)]));
    }

    #[test]
    fn opaque_connections_have_a_rate_and_an_error_rate_of_their_own() {
        let totals = Totals { opened: 30, errors: 10, ..Totals::default() };
        let figures = totals.figures(Protocol::Tcp, Duration::from_secs(60));
        assert_eq!((figures.rate, figures.error_rate, figures.p99_ms), (0.5, 0.25, None));
    }
}
