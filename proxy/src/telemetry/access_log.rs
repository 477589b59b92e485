//! The access log: one line a request, of failures and what policies audit only unless more is asked for. An opaque
//! connection has one where a policy notes something of it.
//!
//! The line is made by whoever writes it and handed to a thread of its own through a bounded queue: a slow disk or a
//! stopped terminal costs lines, which are counted, and never a request's time. What a stranger sent is escaped, so
//! that nobody can forge a line or reach the terminal's escape codes; a query string is left out, since secrets travel
//! there.

use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, SystemTime};

use super::{Flags, Reporter};

/// Lines that wait for the writer at most.
const QUEUE: usize = 4096;
/// Longest path, authority or method shown.
const MAX_TEXT: usize = 1024;

/// The shape of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessLogFormat {
    /// For people, and for what splits at spaces.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Where lines go.
#[derive(Default)]
pub enum AccessLogOutput {
    /// Standard output.
    #[default]
    Stdout,
    /// Standard error.
    Stderr,
    /// A file, appended to.
    File(PathBuf),
    /// Anything else that takes bytes.
    Writer(Box<dyn Write + Send>),
}

impl fmt::Debug for AccessLogOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => f.write_str("Stdout"),
            Self::Stderr => f.write_str("Stderr"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Writer(_) => f.write_str("Writer"),
        }
    }
}

/// What is logged, how, and where to.
#[derive(Debug, Default)]
pub struct AccessLogSettings {
    /// Every request, not only those that failed.
    pub all: bool,
    /// The shape of a line.
    pub format: AccessLogFormat,
    /// Where lines go.
    pub output: AccessLogOutput,
}

/// A request (or an opaque connection) that has ended.
#[derive(Clone, Debug)]
pub struct AccessEntry<'a> {
    /// When it began.
    pub start: SystemTime,
    /// Which end of the edge this proxy is.
    pub reporter: Reporter,
    /// `GET`; empty for opaque TCP.
    pub method: &'a str,
    /// The path; its query is not shown.
    pub path: &'a str,
    /// `Host` or `:authority` as the caller sent it.
    pub authority: &'a str,
    /// `HTTP/1.1`, `HTTP/2` or `TCP`.
    pub protocol: &'a str,
    /// The response's status, or 0 when there was none.
    pub status: u16,
    /// `grpc-status`.
    pub grpc_status: Option<u16>,
    /// Why the response is what it is.
    pub flags: Flags,
    /// What happened, in words: an error's own text. Empty: the flags' words.
    pub detail: &'a str,
    /// From the first byte of the request to the last of the response.
    pub duration: Duration,
    /// Until the endpoint's response head, where there was one.
    pub upstream_duration: Option<Duration>,
    /// Bytes of the request's body.
    pub request_bytes: u64,
    /// Bytes of the response's body.
    pub response_bytes: u64,
    /// The endpoint tried last.
    pub upstream: Option<SocketAddr>,
    /// Who called.
    pub downstream: Option<SocketAddr>,
    /// `web.default:8000`, or what traffic named.
    pub destination: &'a str,
    /// The caller's identity.
    pub source_identity: &'a str,
    /// The endpoint's identity.
    pub destination_identity: &'a str,
    /// `x-request-id`.
    pub request_id: &'a str,
    /// Attempts made; 1 unless retried.
    pub attempts: u32,
    /// The rule that audits it; empty where none does.
    pub audit: &'a str,
    /// What would have become of it if policies that run dry were obeyed; empty where it is the same.
    pub dry_run: &'a str,
}

/// Hands lines to the writer's thread.
pub struct AccessLog {
    all: bool,
    format: AccessLogFormat,
    lines: SyncSender<Message>,
    dropped: metrics::Counter,
}

enum Message {
    Line(String),
    Flush(SyncSender<()>),
}

impl AccessLog {
    pub(super) fn new(settings: AccessLogSettings, dropped: metrics::Counter) -> Self {
        let (lines, queue) = sync_channel(QUEUE);
        let output = settings.output;
        let spawned =
            std::thread::Builder::new().name("access-log".into()).spawn(move || write_lines(queue, open(output)));
        if let Err(error) = spawned {
            tracing::error!(%error, "the access log has no thread to write it; its lines are dropped");
        }
        Self { all: settings.all, format: settings.format, lines, dropped }
    }

    /// Whether a line would be written at all: ask before making an entry.
    pub fn wants(&self, failed: bool) -> bool {
        failed || self.all
    }

    /// Writes a line, or drops and counts it when the writer is too far behind. Never waits.
    pub fn write(&self, entry: &AccessEntry<'_>) {
        let line = match self.format {
            AccessLogFormat::Text => text_line(entry),
            AccessLogFormat::Json => json_line(entry),
        };
        if self.lines.try_send(Message::Line(line)).is_err() {
            self.dropped.increment(1);
        }
    }

    /// Waits until all lines so far are written, at most for `within`. For the end of the process and for tests.
    pub fn flush(&self, within: Duration) {
        let (done, written) = sync_channel(1);
        let deadline = std::time::Instant::now() + within;
        let mut message = Message::Flush(done);
        // The queue may be full; there is no `send_timeout`.
        while let Err(std::sync::mpsc::TrySendError::Full(again)) = self.lines.try_send(message) {
            if std::time::Instant::now() >= deadline {
                return;
            }
            message = again;
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = written.recv_timeout(deadline.saturating_duration_since(std::time::Instant::now()));
    }
}

fn open(output: AccessLogOutput) -> Box<dyn Write + Send> {
    match output {
        AccessLogOutput::Stdout => Box::new(io::stdout()),
        AccessLogOutput::Stderr => Box::new(io::stderr()),
        AccessLogOutput::Writer(writer) => writer,
        AccessLogOutput::File(path) => match std::fs::File::options().create(true).append(true).open(&path) {
            Ok(file) => Box::new(file),
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "cannot open the access log; it goes to stderr");
                Box::new(io::stderr())
            }
        },
    }
}

/// Writes what is queued in one go, then waits. Ends when the last sender is gone.
fn write_lines(queue: Receiver<Message>, output: Box<dyn Write + Send>) {
    let mut output = io::BufWriter::with_capacity(64 << 10, output);
    let mut failed = false;
    while let Ok(first) = queue.recv() {
        let mut flushed = Vec::new();
        for message in std::iter::once(first).chain(queue.try_iter().take(QUEUE)) {
            match message {
                Message::Line(line) => {
                    let _ = output.write_all(line.as_bytes());
                }
                Message::Flush(done) => flushed.push(done),
            }
        }
        match output.flush() {
            Ok(()) => failed = false,
            Err(error) if !failed => {
                failed = true;
                tracing::warn!(%error, "cannot write the access log");
            }
            Err(_) => {}
        }
        for done in flushed {
            let _ = done.send(());
        }
    }
}

fn timestamp(at: SystemTime) -> impl fmt::Display {
    jiff::Timestamp::try_from(at).unwrap_or_default().strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string()
}

fn text_line(e: &AccessEntry<'_>) -> String {
    let mut line = String::with_capacity(512);
    let _ = write_text(&mut line, e);
    line
}

fn write_text(line: &mut String, e: &AccessEntry<'_>) -> fmt::Result {
    let side = match e.reporter {
        Reporter::Source => "outbound",
        Reporter::Destination => "inbound",
    };
    write!(line, "{} {side} ", timestamp(e.start))?;
    match e.method {
        "" => write!(line, "\"{}\"", Escaped(e.protocol))?,
        method => write!(line, "\"{} {} {}\"", Escaped(method), Escaped(path_only(e.path)), Escaped(e.protocol))?,
    }
    write!(line, " {} {} \"", e.status, e.flags)?;
    match e.detail {
        "" => write!(line, "{}", e.flags.words())?,
        detail => write!(line, "{}", Escaped(detail))?,
    }
    write!(line, "\" duration={}", Millis(e.duration))?;
    if let Some(upstream) = e.upstream_duration {
        write!(line, " upstream_duration={}", Millis(upstream))?;
    }
    write!(line, " bytes={}/{}", e.request_bytes, e.response_bytes)?;
    if let Some(grpc) = e.grpc_status {
        write!(line, " grpc_status={grpc}")?;
    }
    if e.attempts > 1 {
        write!(line, " attempts={}", e.attempts)?;
    }
    let texts = [
        ("authority", e.authority),
        ("destination", e.destination),
        ("source_identity", e.source_identity),
        ("destination_identity", e.destination_identity),
        ("request_id", e.request_id),
        ("audit", e.audit),
        ("dry_run", e.dry_run),
    ];
    for (name, value) in texts.into_iter().filter(|(_, value)| !value.is_empty()) {
        write!(line, " {name}=\"{}\"", Escaped(value))?;
    }
    if let Some(upstream) = e.upstream {
        write!(line, " upstream={upstream}")?;
    }
    if let Some(downstream) = e.downstream {
        write!(line, " downstream={downstream}")?;
    }
    line.push('\n');
    Ok(())
}

fn json_line(e: &AccessEntry<'_>) -> String {
    let cut = |text: &str| -> String { text.chars().take(MAX_TEXT).collect() };
    let said = |text: &str| Some(cut(text)).filter(|text| !text.is_empty());
    let millis = |d: Duration| d.as_micros() as f64 / 1000.0;
    let detail = if e.detail.is_empty() { e.flags.words().to_string() } else { cut(e.detail) };
    let object = serde_json::json!({
        "start": timestamp(e.start).to_string(),
        "side": match e.reporter { Reporter::Source => "outbound", Reporter::Destination => "inbound" },
        "method": cut(e.method),
        "path": cut(path_only(e.path)),
        "authority": cut(e.authority),
        "protocol": e.protocol,
        "status": e.status,
        "grpc_status": e.grpc_status,
        "flags": e.flags.to_string(),
        "detail": detail,
        "duration_ms": millis(e.duration),
        "upstream_duration_ms": e.upstream_duration.map(millis),
        "request_bytes": e.request_bytes,
        "response_bytes": e.response_bytes,
        "upstream": e.upstream,
        "downstream": e.downstream,
        "destination": cut(e.destination),
        "source_identity": cut(e.source_identity),
        "destination_identity": cut(e.destination_identity),
        "request_id": cut(e.request_id),
        "attempts": e.attempts,
        "audit": said(e.audit),
        "dry_run": said(e.dry_run),
    });
    // serde_json escapes control characters; what is beyond ASCII stays.
    format!("{object}\n")
}

fn path_only(path: &str) -> &str {
    path.split_once('?').map_or(path, |(path, _)| path)
}

/// Text from a stranger between double quotes: nothing in it ends the quotes or the line, or reaches a terminal.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, c) in self.0.chars().enumerate() {
            match c {
                _ if n == MAX_TEXT => return f.write_str("…"),
                '"' => f.write_str("\\\"")?,
                '\\' => f.write_str("\\\\")?,
                // Beyond control characters, whatever could turn the line round or hide a part of it.
                c if c.is_control() || (!c.is_ascii() && !c.is_alphanumeric()) => write!(f, "{}", c.escape_unicode())?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

struct Millis(Duration);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.0.as_micros();
        write!(f, "{}.{:03}ms", micros / 1000, micros % 1000)
    }
}
