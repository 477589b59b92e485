//! What a connection speaks, read from its first bytes. Pure: bytes in, a verdict out.
//!
//! A verdict other than [`Detected::NeedMore`] is final: more bytes of the same connection never change it, and it does
//! not depend on how the bytes were cut into reads. A wrong "this is HTTP" breaks a database client, a wrong "this is
//! opaque" only costs features, so HTTP/1 has to show its whole first line up to the version:
//!
//! ```text
//! METHOD SP target SP HTTP/1.
//! ```
//!
//! `PING\r\n` and `SET a b\r\n` (Redis inline), `EHLO me\r\n`, `SSH-2.0-…\r\n`, `PROXY TCP4 …`, RTSP and SIP all fail
//! within that line, at the first byte that cannot belong to it. Binary protocols (PostgreSQL's SSLRequest, MySQL,
//! MongoDB, Kafka, AMQP, MQTT) fail within their first few bytes.

/// What the first bytes of a connection are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Detected {
    /// A request line of HTTP/1.0 or HTTP/1.1, whatever its method.
    Http1,
    /// The connection preface of HTTP/2 with prior knowledge (RFC 9113 §3.4).
    Http2,
    /// A TLS record that begins a ClientHello (RFC 8446 §5.1).
    Tls,
    /// None of these: bytes to be carried, not read.
    Opaque,
    /// The bytes are the beginning of more than one answer; ask again with more of them.
    NeedMore,
}

/// The most bytes ever looked at. RFC 9112 §3 asks for request lines of 8,000 octets at least; one that is longer and
/// flawless so far is taken for HTTP/1, so that its sender gets a 414 and not silence.
pub const MOST_BYTES: usize = 8 * 1024;

/// The longest method known to the registry has 17 octets (`UPDATEREDIRECTREF`); applications invent longer ones.
const LONGEST_METHOD: usize = 64;

/// RFC 9112 §2.2: a server should ignore an empty line before the request line. Two of them are still an accident.
const MOST_EMPTY_LINES: usize = 2;

const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Says what a connection speaks that began with `first_bytes`.
pub fn detect(first_bytes: &[u8]) -> Detected {
    let bytes = first_bytes.get(..MOST_BYTES).unwrap_or(first_bytes);
    match (http2(bytes), tls(bytes), http1(bytes)) {
        (Match::Yes, _, _) => Detected::Http2,
        (_, Match::Yes, _) => Detected::Tls,
        (_, _, Match::Yes) => Detected::Http1,
        (Match::No, Match::No, Match::No) => Detected::Opaque,
        _ => Detected::NeedMore,
    }
}

/// Ports whose protocols are never HTTP, and in which the server speaks first or a proxy has nothing to read: opaque at
/// once, without a look at a byte.
pub fn is_known_opaque(port: u16) -> bool {
    matches!(
        port,
        21 | 22 | 25 | 110 | 143 | 587 // FTP, SSH, SMTP, POP3, IMAP, submission
            | 1433 | 1521 | 3306 | 5432 | 27017 | 33060 // SQL Server, Oracle, MySQL, PostgreSQL, MongoDB, MySQL X
            | 4222 | 4444 | 6379 | 9300 | 11211 // NATS, Galera, Redis, Elasticsearch transport, memcached
    )
}

/// How far bytes agree with one protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Match {
    Yes,
    SoFar,
    No,
}

fn http2(bytes: &[u8]) -> Match {
    if bytes.starts_with(HTTP2_PREFACE) {
        Match::Yes
    } else if HTTP2_PREFACE.starts_with(bytes) {
        Match::SoFar
    } else {
        Match::No
    }
}

/// A record header of a handshake, and the first byte of the handshake in it: type 22, version 3.0 to 3.4, a length
/// from 1 to 2^14 (RFC 8446 §5.1), then ClientHello, which is 1.
fn tls(bytes: &[u8]) -> Match {
    let fits = |i: usize, ok: fn(u8) -> bool| bytes.get(i).is_none_or(|byte| ok(*byte));
    let record = fits(0, |b| b == 22) && fits(1, |b| b == 3) && fits(2, |b| b <= 4);
    let length = match bytes.get(3..5) {
        Some(length) => (1..=1 << 14).contains(&length.iter().fold(0u16, |n, b| n << 8 | u16::from(*b))),
        None => fits(3, |b| b <= 1 << 6),
    };
    match (record && length && fits(5, |b| b == 1), bytes.len()) {
        (false, _) => Match::No,
        (true, 6..) => Match::Yes,
        (true, _) => Match::SoFar,
    }
}

fn http1(bytes: &[u8]) -> Match {
    let mut line = bytes;
    for _ in 0..MOST_EMPTY_LINES {
        if line == b"\r" {
            return Match::SoFar;
        }
        line = line.strip_prefix(b"\r\n").unwrap_or(line);
    }

    // RFC 9110 §9.1: a method is a token, and case matters.
    let method = line.iter().take_while(|byte| is_token(**byte)).count();
    if method > LONGEST_METHOD {
        return Match::No;
    }
    let Some(rest) = line.get(method..).filter(|rest| !rest.is_empty()) else { return Match::SoFar };
    let (true, Some(rest)) = (method > 0, rest.strip_prefix(b" ")) else { return Match::No };

    // No whitespace and no control within a target; bytes above ASCII are wrong by RFC 3986 and sent all the same.
    let target = rest.iter().take_while(|byte| **byte > b' ' && **byte != 0x7f).count();
    let version = match rest.get(target..).filter(|rest| !rest.is_empty()) {
        Some(rest) if target > 0 => rest,
        Some(_) => return Match::No,
        None if bytes.len() < MOST_BYTES => return Match::SoFar,
        None => return if names_a_resource(rest) { Match::Yes } else { Match::No },
    };

    const VERSION: &[u8] = b" HTTP/1.";
    if version.starts_with(VERSION) {
        Match::Yes
    } else if !VERSION.starts_with(version) {
        Match::No
    } else if bytes.len() < MOST_BYTES {
        Match::SoFar
    } else {
        // Cut by the limit within the version: a line this long and this right is a request.
        Match::Yes
    }
}

/// Whether a target too long to be seen whole is one of RFC 9112 §3.2: origin form or absolute form.
fn names_a_resource(target: &[u8]) -> bool {
    target.starts_with(b"/") || target.starts_with(b"http://") || target.starts_with(b"https://")
}

/// `tchar` of RFC 9110 §5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}
