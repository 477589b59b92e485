//! Why requests went the way they did: the records behind `/explain`.
//!
//! Every failure is kept, and one success in a hundred, each as the JSON document that is shown. There is a ring for each
//! thread that carries requests, bounded in bytes; the oldest goes first. A thread keeps ten successes a second at most, and a
//! request that is not kept pays for one count.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Bytes of records that one ring keeps.
const MOST_BYTES: usize = 1 << 20;
/// What one record takes beside its text.
const BESIDE: usize = 96;
/// Threads that carry requests have one each; more than these share.
const RINGS: usize = 16;
/// One success in so many is kept, unless somebody says otherwise.
const ONE_IN: u32 = 100;
/// Between two successes that are kept, unless all are: to tell one takes as long as to carry it.
const PAUSE: Duration = Duration::from_millis(100);
/// Records that are listed at most.
const MOST_LISTED: usize = 200;

/// The records of a process.
pub struct Explained {
    /// 0: no success is kept.
    one_in: AtomicU32,
    rings: [Mutex<Ring>; RINGS],
}

#[derive(Default)]
struct Ring {
    records: VecDeque<Record>,
    bytes: usize,
}

struct Record {
    id: Box<str>,
    /// Milliseconds since 1970, to put the records of all rings in order.
    at: u64,
    document: Box<str>,
}

impl Record {
    fn bytes(&self) -> usize {
        self.id.len() + self.document.len() + BESIDE
    }
}

impl Default for Explained {
    fn default() -> Self {
        Self { one_in: AtomicU32::new(ONE_IN), rings: Default::default() }
    }
}

thread_local! {
    /// Requests that this thread has begun.
    static BEGUN: Cell<u32> = const { Cell::new(0) };
    /// When it last kept a success.
    static SAMPLED: Cell<Option<Instant>> = const { Cell::new(None) };
    /// Which ring is this thread's.
    static RING: Cell<Option<usize>> = const { Cell::new(None) };
}

impl Explained {
    /// Counts a request that begins, and says whether it is kept even if all goes well.
    pub fn samples(&self, now: Instant) -> bool {
        let one_in = self.one_in.load(Relaxed);
        let begun = BEGUN.get().wrapping_add(1);
        BEGUN.set(begun);
        if begun.checked_rem(one_in) != Some(1 % one_in.max(1)) {
            return false;
        }
        let too_soon = |last: Instant| now.saturating_duration_since(last) < PAUSE;
        if one_in > 1 && SAMPLED.get().is_some_and(too_soon) {
            return false;
        }
        SAMPLED.set(Some(now));
        true
    }

    /// One success in so many.
    pub fn one_in(&self) -> u32 {
        self.one_in.load(Relaxed)
    }

    /// Keeps one success in so many from now on; 0 keeps none, 1 all.
    pub fn keep_one_in(&self, requests: u32) {
        self.one_in.store(requests, Relaxed);
    }

    /// Keeps a request's record. `at` is in milliseconds since 1970.
    pub fn keep(&self, id: &str, at: u64, document: &Value) {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        let number = RING.get().unwrap_or_else(|| THREADS.fetch_add(1, Relaxed));
        RING.set(Some(number));
        let Some(ring) = self.rings.get(number % RINGS) else { return };
        let record = Record { id: id.into(), at, document: document.to_string().into() };
        // Never contended but by somebody who looks at them.
        let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.bytes += record.bytes();
        ring.records.push_back(record);
        while ring.bytes > MOST_BYTES {
            let Some(oldest) = ring.records.pop_front() else { return };
            ring.bytes -= oldest.bytes();
        }
    }

    /// The newest records that fit, newest first.
    fn newest(&self, fits: impl Fn(&Record) -> bool) -> Vec<Value> {
        let mut found: Vec<(u64, Value)> = Vec::new();
        for ring in &self.rings {
            let ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
            let newest = ring.records.iter().rev().filter(|record| fits(record)).take(MOST_LISTED);
            found.extend(newest.filter_map(|record| Some((record.at, serde_json::from_str(&record.document).ok()?))));
        }
        found.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
        found.truncate(MOST_LISTED);
        found.into_iter().map(|(_, document)| document).collect()
    }

    /// Everything kept of a request, newest first.
    pub fn of(&self, id: &str) -> Vec<Value> {
        self.newest(|record| &*record.id == id)
    }

    /// The list of `/explain`.
    pub fn list(&self) -> Value {
        const SHOWN: [&str; 9] =
            ["request_id", "at", "side", "method", "path", "destination", "status", "flags", "ended_by"];
        let line = |record: Value| {
            Value::Object(SHOWN.map(|name| (name.to_string(), record[name].clone())).into_iter().collect())
        };
        let records: Vec<Value> = self.newest(|_| true).into_iter().map(line).collect();
        json!({ "successes_kept_one_in": self.one_in(), "requests": records })
    }
}

/// How the rule is called that stands for none, where a route has no rule for a request.
pub const NO_RULE: &str = "#no-rule";

/// Whatever strangers sent, nothing in it reaches a terminal but letters: what could move its cursor, turn a line round or hide
/// a part of it is shown in JSON's form, `\u009b`.
pub fn plain(text: &str) -> String {
    use std::fmt::Write;

    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c == '\n' || !c.is_control() && (c.is_ascii() || c.is_alphanumeric()) {
            out.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            let _ = write!(out, "\\u{unit:04x}");
        }
    }
    out
}

/// A record in words, one decision a line, in their order.
pub fn text(record: &Value) -> String {
    let word = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_string(),
        other => other.to_string(),
    };
    let of = |name: &str| word(&record[name]);
    let mut lines = vec![
        format!("{} {} {} ({})", of("request_id"), of("method"), of("path"), of("at")),
        format!("  caught     {} from {}, {}", of("caught"), of("downstream"), of("detected")),
    ];
    if !record["source"].is_null() {
        lines.push(format!("  caller     {}", of("source")));
    }
    lines.push(match record["rule"].is_null() {
        true => format!("  routed     to {} for {}", of("destination"), of("target")),
        false if word(&record["rule"]["name"]).ends_with(NO_RULE) => format!(
            "  routed     to {} for {}: no rule takes it ({})",
            of("destination"),
            of("target"),
            word(&record["rule"]["place"])
        ),
        false => format!(
            "  routed     to {} for {} by rule {} ({})",
            of("destination"),
            of("target"),
            word(&record["rule"]["name"]),
            word(&record["rule"]["place"])
        ),
    });
    for (number, attempt) in record["attempts"].as_array().into_iter().flatten().enumerate() {
        let candidates = &attempt["candidates"];
        if let Some(all) = candidates["endpoints"].as_array() {
            lines.push(format!(
                "  candidates {} of {}, {}:",
                all.len(),
                candidates["total"],
                word(&candidates["seen"])
            ));
            lines.extend(all.iter().map(|one| {
                format!("             {} {} score {}", word(&one["endpoint"]), word(&one["state"]), word(&one["score"]))
            }));
        }
        lines.push(format!(
            "  attempt {}  {} over a {} connection: {} after {} ms",
            number + 1,
            word(&attempt["endpoint"]),
            word(&attempt["connection"]),
            word(&attempt["outcome"]),
            word(&attempt["ms"])
        ));
        if !attempt["retry"].is_null() {
            lines.push(format!(
                "  retry      {}: {}",
                word(&attempt["retry"]["verdict"]),
                word(&attempt["retry"]["reason"])
            ));
        }
    }
    let grpc = record["grpc_status"].as_u64().map(|code| format!(", gRPC {code}")).unwrap_or_default();
    lines.push(format!("  ended      status {}{grpc}, flags {}, after {} ms", of("status"), of("flags"), of("ms")));
    lines.push(format!("  ended by   {}", of("ended_by")));
    plain(&(lines.join("\n") + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_newest_and_stays_within_its_bytes() {
        let explained = Explained::default();
        for number in 0..5_000_u64 {
            let document = json!({ "request_id": format!("r{number}"), "detail": "x".repeat(1_000) });
            explained.keep(&format!("r{number}"), number, &document);
        }
        let bytes: usize = explained.rings.iter().map(|ring| ring.lock().unwrap().bytes).sum();
        assert!(bytes <= MOST_BYTES && bytes > MOST_BYTES / 2, "{bytes}");
        assert_eq!(explained.of("r4999").len(), 1);
        assert!(explained.of("r0").is_empty());
        assert_eq!(explained.list()["requests"][0]["request_id"], "r4999");
    }

    #[test]
    fn no_rule_is_said_where_a_route_has_none_and_nowhere_else() {
        let said = |record: Value| text(&record).lines().find(|line| line.contains("routed")).unwrap().to_string();
        let record = |rule: Value| json!({ "destination": "web.default:80", "target": "web:80", "rule": rule });
        assert_eq!(said(record(Value::Null)), "  routed     to web.default:80 for web:80");
        let rule = |name: &str| record(json!({ "name": name, "place": "a.yaml:7" }));
        assert!(said(rule("default/r#no-rule")).ends_with("for web:80: no rule takes it (a.yaml:7)"));
        assert!(said(rule("default/r#0")).ends_with("for web:80 by rule default/r#0 (a.yaml:7)"));
    }

    #[test]
    fn what_a_stranger_sent_does_not_reach_a_terminal_as_it_is() {
        let told = text(&json!({ "path": "/\u{9b}2J\u{202e}\u{1b}[1m\n\u{200b}/ä" }));
        assert!(told.contains("/\\u009b2J\\u202e\\u001b[1m"), "{told}");
    }

    #[test]
    fn one_success_in_as_many_as_asked_for_is_kept() {
        let explained = Explained::default();
        let mut now = Instant::now();
        // Of a thousand requests, so long after each other.
        let mut kept = |every: Duration| {
            now += PAUSE;
            let kept = (0..1_000).filter(|at| explained.samples(now + every * *at)).count();
            now += every * 1_000;
            kept
        };
        assert_eq!(kept(Duration::from_millis(10)), 10);
        assert_eq!(kept(Duration::from_micros(10)), 1, "ten a second at most");
        explained.keep_one_in(1);
        assert_eq!(kept(Duration::ZERO), 1_000);
        explained.keep_one_in(0);
        assert_eq!(kept(Duration::from_millis(10)), 0);
    }
}
