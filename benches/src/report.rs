//! The table, and whether each row has what is asked of it.

use crate::rows::{Outcome, Row};
use crate::systems::{Http, Make};

const COLUMNS: [(Make, Http, &str); 7] = [
    (Make::Nginx, Http::One, "nginx"),
    (Make::Haproxy, Http::One, "HAProxy h1"),
    (Make::Haproxy, Http::Two, "HAProxy h2"),
    (Make::Envoy, Http::One, "Envoy h1"),
    (Make::Envoy, Http::Two, "Envoy h2"),
    (Make::Before, Http::Two, "before"),
    (Make::Sheetbend, Http::Two, "Sheetbend"),
];

/// Those of which something was measured; the other build of ours is seldom there.
fn columns(outcome: &Outcome) -> impl Iterator<Item = &'static (Make, Http, &'static str)> {
    let before = Row::ALL.into_iter().any(|row| outcome.beside_before(row).is_some());
    COLUMNS.iter().filter(move |(make, ..)| before || *make != Make::Before)
}

/// What is asked of Sheetbend in a row.
enum Target {
    /// At most this part of the better Envoy, and below nginx where it says so.
    Envoy { part: f64, below_nginx: bool },
    /// At most this, in the row's own unit.
    AtMost(f64),
    /// At most this part of what it is where resources switch each policy off. What is switched off is still asked whether
    /// it is: that is not seen here.
    WithoutPolicies { part: f64 },
}

impl Row {
    const ALL: [Self; 12] = [
        Self::Small,
        Self::Latency,
        Self::Http2,
        Self::Large,
        Self::Fresh,
        Self::Handshake,
        Self::Idle,
        Self::IdleConnection,
        Self::Start,
        Self::Size,
        Self::Registered,
        Self::Policies,
    ];

    fn title(self) -> &'static str {
        match self {
            Self::Small => "HTTP/1.1 small GET, 64 connections, CPU a request (µs)",
            Self::Latency => "added p50 at 1 connection (µs)",
            Self::Http2 => "HTTP/2 small GET, 16 × 32 streams, CPU a request (µs)",
            Self::Large => "1 MiB GET, CPU a byte (ns)",
            Self::Fresh => "a new client connection a request, CPU (µs)",
            Self::Handshake => "full mTLS handshake at the inbound proxy, CPU (µs)",
            Self::Idle => "RSS of the pair, idle (MiB)",
            Self::IdleConnection => "RSS of each of 5,000 idle connections (KiB)",
            Self::Start => "start of both to the first answer (ms)",
            Self::Size => "size of the program (MiB)",
            Self::Registered => "registration to the first request that it routes, p99 (ms)",
            Self::Policies => "HTTP/1.1 small GET with the policies that hold by default, CPU a request (µs)",
        }
    }

    /// From the measured unit (nanoseconds, bytes) to the title's.
    fn divisor(self) -> f64 {
        match self {
            Self::Small | Self::Policies | Self::Latency | Self::Http2 | Self::Fresh | Self::Handshake => 1e3,
            Self::Large => 1.0,
            Self::IdleConnection => 1024.0,
            Self::Idle | Self::Size => 1024.0 * 1024.0,
            Self::Start | Self::Registered => 1e6,
        }
    }

    fn target(self) -> Target {
        match self {
            Self::Small => Target::Envoy { part: 0.6, below_nginx: true },
            Self::Latency => Target::Envoy { part: 0.6, below_nginx: false },
            Self::Http2 => Target::Envoy { part: 0.5, below_nginx: false },
            Self::Large => Target::Envoy { part: 1.0, below_nginx: false },
            Self::Fresh => Target::Envoy { part: 0.8, below_nginx: false },
            Self::Handshake => Target::Envoy { part: 0.9, below_nginx: false },
            Self::Idle => Target::AtMost(30.0),
            Self::IdleConnection => Target::AtMost(12.0),
            Self::Start => Target::AtMost(100.0),
            Self::Size => Target::AtMost(15.0),
            Self::Registered => Target::AtMost(10.0),
            Self::Policies => Target::WithoutPolicies { part: 1.05 },
        }
    }
}

/// The results as Markdown.
pub(crate) fn render(outcome: &Outcome, machine: &[String], quick: bool) -> String {
    let mut text = String::from("# What a pair of sidecars costs\n\n");
    text += "Written by `make bench`; only ratios within one run count. Each column is a pair of proxies with mutual\n\
             TLS 1.3 between them, pooled connections, and each side's certificate and name checked by the other. Both\n\
             proxies share one core, load and origin the other. h1, h2: HTTP/1.1 or HTTP/2 between the two. A cell is the\n\
             median of interleaved rounds; CPU is what the kernel counted for all threads of both proxies.\n\n";
    text += &machine.join("\n");
    text += "\n\n";
    text += &header(outcome);
    for row in Row::ALL {
        if columns(outcome).any(|(make, between, _)| outcome.median(row, *make, *between).is_some()) {
            text += &line(outcome, row);
        }
    }
    text += "\n";
    if let Some(direct) = outcome.direct() {
        text += &format!("Without proxies, p50 at 1 connection is {:.1} µs.\n", direct / 1e3);
    }
    for row in Row::ALL {
        if let Some(ratio) = outcome.beside_before(row) {
            text += &format!("{ratio:.3} × what it is with the build before: {}.\n", row.title());
        }
    }
    for note in &outcome.notes {
        text += &format!("{note}\n");
    }
    text += &trust(outcome);
    if quick {
        text += "A quick run: too short to compare with another.\n";
    }
    text
}

fn header(outcome: &Outcome) -> String {
    let names: Vec<_> = columns(outcome).map(|(.., name)| *name).collect();
    let rule: Vec<_> = columns(outcome).map(|_| "--:").collect();
    format!("| | {} | at least | |\n|---|{}|---|---|\n", names.join(" | "), rule.join("|"))
}

fn line(outcome: &Outcome, row: Row) -> String {
    let cell = |(make, between, _): &(Make, Http, &str)| {
        let value = outcome.median(row, *make, *between);
        let failed = outcome.failed(row, *make, *between);
        let text = value.map_or("–".to_string(), |value| figure(value / row.divisor()));
        if failed > 0 { format!("{text} ({failed} failed)") } else { text }
    };
    let cells: Vec<_> = columns(outcome).map(cell).collect();
    let (asked, verdict) = judge(outcome, row);
    format!("| {} | {} | {asked} | {verdict} |\n", row.title(), cells.join(" | "))
}

fn figure(value: f64) -> String {
    if value < 10.0 { format!("{value:.2}") } else { format!("{value:.1}") }
}

/// What is asked, and what came of it.
fn judge(outcome: &Outcome, row: Row) -> (String, String) {
    let ours = outcome.best(row, Make::Sheetbend);
    let envoy = outcome.best(row, Make::Envoy);
    match row.target() {
        Target::AtMost(limit) => {
            let verdict = ours.map(|ours| met(ours / row.divisor() <= limit, ""));
            (format!("{limit} or less"), verdict.unwrap_or_default())
        }
        Target::WithoutPolicies { part } => {
            let verdict =
                outcome.policies().map(|found| met(found <= part, &format!(", {found:.3} × where each is off")));
            (format!("{part} × where each is off"), verdict.unwrap_or_default())
        }
        Target::Envoy { part, below_nginx } => {
            let also = if below_nginx { ", and below nginx" } else { "" };
            let verdict = ours.zip(envoy).map(|(ours, envoy)| {
                let nginx = outcome.best(row, Make::Nginx).filter(|_| below_nginx);
                let holds = ours / envoy <= part && nginx.is_none_or(|nginx| ours < nginx);
                met(holds, &format!(", {:.2} × Envoy", ours / envoy))
            });
            (format!("{part} × Envoy{also}"), verdict.unwrap_or_default())
        }
    }
}

fn met(holds: bool, how: &str) -> String {
    format!("{}{how}", if holds { "holds" } else { "**falls short**" })
}

fn trust(outcome: &Outcome) -> String {
    let Some(ratio) = outcome.yardstick() else { return String::new() };
    match outcome.is_trustworthy() {
        true => format!("nginx ÷ Envoy, both with HTTP/1.1 between: {ratio:.2}, within the usual 0.35–0.75.\n"),
        false => format!(
            "**Not to be trusted**: nginx ÷ Envoy, both with HTTP/1.1 between, is {ratio:.2} (usual: 0.35–0.75), or \
             requests failed.\n"
        ),
    }
}
