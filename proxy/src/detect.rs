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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    use super::*;

    const HTTP1: &[&[u8]] = &[
        b"GET / HTTP/1.1\r\nhost: web\r\n\r\n",
        b"GET http://web/a?b HTTP/1.0\r\n\r\n",
        b"CONNECT web:80 HTTP/1.1\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\n\r\n",
        b"BASELINE-CONTROL /x HTTP/1.1\r\n",
        b"m!#$%&'*+-.^_`|~1 /x HTTP/1.1\r\n",
        b"PRI * HTTP/1.1\r\n",
        b"PRIVATE / HTTP/1.1\r\n",
        b"\r\nPOST / HTTP/1.1\r\n",
        b"GET /caf\xc3\xa9 HTTP/1.1\r\n",
    ];

    const OPAQUE: &[&[u8]] = &[
        b"PING\r\n",
        b"SET key value\r\n",
        b"SET / HTTP/2.0\r\n",
        b"*1\r\n$4\r\nPING\r\n",
        b"EHLO me.example\r\n",
        b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
        b"PROXY UNKNOWN\r\n",
        b"OPTIONS rtsp://camera/ RTSP/1.0\r\n",
        b"INVITE sip:a@b SIP/2.0\r\n",
        b"CONNECT {\"verbose\":false}\r\n",
        b"get key\r\n",
        b"GET /\r\n",
        b"GET  / HTTP/1.1\r\n",
        b" GET / HTTP/1.1\r\n",
        b"GET\t/ HTTP/1.1\r\n",
        b"\r\n\r\n\r\nGET / HTTP/1.1\r\n",
        b"\x00\x00\x00\x08\x04\xd2\x16\x2f", // PostgreSQL, SSLRequest
        b"\x00\x00\x00\x2b\x00\x03\x00\x00user\x00postgres\x00", // PostgreSQL, start-up
        b"\x10\x0f\x00\x04MQTT\x04",         // MQTT, CONNECT
        b"AMQP\x00\x00\x09\x01",
        b"\x3a\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\xd4\x07\x00\x00", // MongoDB, OP_QUERY
        b"\x80\x2e\x01\x03\x01",                                             // SSL 2 hello
        b"\x16\x03\x01\x00\x00\x01",                                         // an empty record
        b"\x16\x03\x01\x40\x01\x01",                                         // a record larger than any
        b"\x16\x03\x01\x00\x20\x02",                                         // ServerHello
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\0",
    ];

    #[test]
    fn real_greetings_are_told_apart() {
        for bytes in HTTP1 {
            assert_eq!(detect(bytes), Detected::Http1, "{}", bytes.escape_ascii());
        }
        for bytes in OPAQUE {
            assert_eq!(detect(bytes), Detected::Opaque, "{}", bytes.escape_ascii());
        }
        assert_eq!(detect(HTTP2_PREFACE), Detected::Http2);
        assert_eq!(detect(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"), Detected::Tls);
        assert_eq!(detect(b""), Detected::NeedMore);
    }

    #[test]
    fn a_command_line_of_another_protocol_is_opaque_no_later_than_its_line_end() {
        for bytes in OPAQUE {
            let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n").filter(|end| *end > 0) else { continue };
            if bytes.starts_with(b"\r\n") || bytes.starts_with(b"PRI") {
                continue;
            }
            assert_eq!(detect(&bytes[..end + 2]), Detected::Opaque, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn a_request_line_longer_than_the_limit_is_http_when_it_names_a_resource() {
        let long = "a".repeat(MOST_BYTES);
        for (line, expected) in [
            (format!("GET /{long}"), Detected::Http1),
            (format!("GET https://{long}"), Detected::Http1),
            (format!("GET {long}"), Detected::Opaque),
            (long.clone(), Detected::Opaque),
        ] {
            assert_eq!(detect(line.as_bytes()), expected, "{:.20}", line);
        }
        let line = format!("GET /{} HTTP/1.1\r\n", "a".repeat(MOST_BYTES - 12));
        for len in MOST_BYTES - 20..MOST_BYTES {
            assert_eq!(detect(&line.as_bytes()[..len]), Detected::NeedMore, "{len} bytes");
        }
        assert_eq!(detect(line.as_bytes()), Detected::Http1);
    }

    #[test]
    fn a_method_may_be_long_but_not_endless() {
        let method = |len| format!("{} / HTTP/1.1\r\n", "M".repeat(len));
        assert_eq!(detect(method(LONGEST_METHOD).as_bytes()), Detected::Http1);
        assert_eq!(detect(method(LONGEST_METHOD + 1).as_bytes()), Detected::Opaque);
    }

    /// Beginnings that lead deep into each branch, with noise after them and within them.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let known: Vec<Vec<u8>> = HTTP1.iter().chain(OPAQUE).chain([&HTTP2_PREFACE]).map(|b| b.to_vec()).collect();
        let near = (prop::sample::select(known), any::<prop::sample::Index>(), any::<u8>(), any::<bool>()).prop_map(
            |(mut bytes, at, byte, change)| {
                let at = at.index(bytes.len());
                if change {
                    bytes[at] = byte;
                }
                bytes
            },
        );
        let long =
            (MOST_BYTES - 200..MOST_BYTES + 200).prop_map(|len| format!("GET /{} HTTP/1.1\r\n", "a".repeat(len)));
        prop_oneof![4 => near, 2 => prop::collection::vec(any::<u8>(), 0..64), 1 => "[A-Z /\r\n]{0,40}".prop_map(String::into_bytes), 1 => long.prop_map(String::into_bytes)]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2_000, rng_seed: RngSeed::Fixed(15101), ..ProptestConfig::default() })]

        #[test]
        fn once_given_a_verdict_is_never_taken_back(bytes in bytes()) {
            let mut verdict = Detected::NeedMore;
            // Every cut of a short beginning; of a long one, those near its two ends and near the limit.
            let cuts = (0..=bytes.len()).filter(|len| *len < 100 || len % 211 == 0 || *len > MOST_BYTES - 100);
            for len in cuts {
                let now = detect(&bytes[..len]);
                if verdict != Detected::NeedMore {
                    prop_assert_eq!(now, verdict, "after {} bytes of {}", len, bytes.escape_ascii());
                }
                verdict = now;
            }
        }

        #[test]
        fn there_is_always_a_verdict_within_the_limit(mut bytes in bytes(), filler in any::<u8>()) {
            bytes.resize(MOST_BYTES, filler);
            prop_assert_ne!(detect(&bytes), Detected::NeedMore);
        }
    }
}
