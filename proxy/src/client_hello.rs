//! The ClientHello of a TLS connection, read without becoming part of the handshake.
//!
//! The caller keeps the bytes, hands a view of them to [`parse`], and replays them afterwards to whoever terminates or
//! carries the connection: nothing is consumed, nothing is answered, no alert is sent. A hello with a post-quantum key
//! share is larger than a TCP segment, and may be cut into several TLS records, so [`Hello::NeedMore`] is common.

use std::io;

use rustls::server::Acceptor;

/// The most bytes a hello may take, record headers included. Real ones have about 2 KiB.
pub const MOST_BYTES: usize = 16 * 1024;

/// What the bytes of a connection say about its ClientHello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hello {
    /// The hello is not complete; ask again with more bytes.
    NeedMore,
    /// It is here, and well formed.
    Parsed(ClientHello),
    /// Not a hello that we can read, or one larger than [`MOST_BYTES`]: the connection is opaque.
    NotParseable,
}

/// The part of a ClientHello that decides who terminates it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientHello {
    /// The server name (RFC 6066 §3), in lower case, if the client sent one.
    pub sni: Option<Box<str>>,
    /// The protocols that the client offers (RFC 7301), the preferred one first.
    pub alpn: Vec<Vec<u8>>,
}

impl ClientHello {
    /// Whether the client offers any of `protocols`.
    pub fn offers(&self, protocols: &[&[u8]]) -> bool {
        self.alpn.iter().any(|offered| protocols.contains(&offered.as_slice()))
    }
}

/// Reads a ClientHello from the first bytes of a connection. The verdict does not depend on how they were cut into reads.
pub fn parse(bytes: &[u8]) -> Hello {
    let seen = bytes.get(..MOST_BYTES).unwrap_or(bytes);
    match extent(seen) {
        Extent::Complete(hello) => accept(hello).map_or(Hello::NotParseable, Hello::Parsed),
        Extent::SoFar if seen.len() < MOST_BYTES => Hello::NeedMore,
        Extent::SoFar | Extent::Never => Hello::NotParseable,
    }
}

/// How much of the bytes is the hello.
enum Extent<'a> {
    /// These records, and nothing after them.
    Complete(&'a [u8]),
    SoFar,
    Never,
}

/// Walks record headers alone, so that a sender of single bytes costs no parsing and no memory.
fn extent(bytes: &[u8]) -> Extent<'_> {
    const HANDSHAKE: u8 = 22;
    const CLIENT_HELLO: u8 = 1;
    let mut message = [0; 4]; // Its type and 24-bit length, which records may cut apart.
    let mut have = 0;
    let mut rest = bytes;
    while let Some((record, body)) = rest.split_at_checked(5) {
        let [kind, major, _, high, low] = *record else { return Extent::Never };
        let length = usize::from(u16::from_be_bytes([high, low]));
        if kind != HANDSHAKE || major != 3 || length == 0 || length > 1 << 14 {
            return Extent::Never;
        }
        let (fragment, after) = body.split_at_checked(length).unwrap_or((body, &[]));
        for (slot, byte) in message.iter_mut().skip(have).zip(fragment) {
            *slot = *byte;
        }
        have += fragment.len();
        rest = after;
        let [kind, a, b, c] = message;
        if have > 0 && kind != CLIENT_HELLO {
            return Extent::Never;
        }
        if have >= 4 {
            let whole = 4 + (usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c));
            if whole > MOST_BYTES {
                return Extent::Never;
            }
            // rustls takes records as a whole, so the last one has to be complete too.
            if have >= whole && fragment.len() == length {
                return bytes.get(..bytes.len() - rest.len()).map_or(Extent::Never, Extent::Complete);
            }
        }
    }
    match rest.first() {
        Some(kind) if *kind != HANDSHAKE => Extent::Never,
        _ => Extent::SoFar,
    }
}

/// Lets rustls parse a copy of a complete hello.
fn accept(mut bytes: &[u8]) -> Option<ClientHello> {
    let mut acceptor = Acceptor::default();
    while !bytes.is_empty() {
        match acceptor.read_tls(&mut bytes as &mut dyn io::Read) {
            Ok(1..) => {}
            Ok(0) | Err(_) => return None,
        }
        if let Some(accepted) = acceptor.accept().ok()? {
            let hello = accepted.client_hello();
            return Some(ClientHello {
                sni: hello.server_name().map(|name| name.to_ascii_lowercase().into_boxed_str()),
                alpn: hello.alpn().into_iter().flatten().map(<[u8]>::to_vec).collect(),
            });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;
    use rustls::crypto::aws_lc_rs;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    use super::*;

    /// What a real client sends first.
    fn hello(name: &'static str, alpn: &[&[u8]], post_quantum: bool) -> Vec<u8> {
        let mut provider = aws_lc_rs::default_provider();
        provider.kx_groups.clear();
        if post_quantum {
            provider.kx_groups.push(aws_lc_rs::kx_group::X25519MLKEM768);
        }
        provider.kx_groups.push(aws_lc_rs::kx_group::X25519);
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        let mut client = ClientConnection::new(Arc::new(config), name.try_into().unwrap()).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    /// The same message in records of at most `size` bytes.
    fn in_records_of(size: usize, hello: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for fragment in hello[5..].chunks(size) {
            bytes.extend([22, 3, 1]);
            bytes.extend((fragment.len() as u16).to_be_bytes());
            bytes.extend(fragment);
        }
        bytes
    }

    fn mesh() -> Vec<u8> {
        hello("8000.web.default.cluster.local", &[b"sheetbend/h2", b"sheetbend/tcp"], true)
    }

    #[test]
    fn names_and_protocols_are_read() {
        let Hello::Parsed(hello) = parse(&mesh()) else { panic!("not parsed") };
        assert_eq!(hello.sni.as_deref(), Some("8000.web.default.cluster.local"));
        assert_eq!(hello.alpn, [b"sheetbend/h2".to_vec(), b"sheetbend/tcp".to_vec()]);
        assert!(hello.offers(&[b"sheetbend/tcp"]) && !hello.offers(&[b"h2"]));
    }

    #[test]
    fn a_hello_without_name_or_protocols_is_still_one() {
        let parsed = parse(&hello("192.0.2.1", &[], false));
        assert_eq!(parsed, Hello::Parsed(ClientHello { sni: None, alpn: Vec::new() }));
    }

    #[test]
    fn a_post_quantum_hello_is_read_however_many_records_carry_it() {
        let whole = mesh();
        assert!(whole.len() > 1460, "it should not fit a segment, or this proves nothing: {}", whole.len());
        let expected = parse(&whole);
        for size in [1, 2, 3, 4, 5, 100, 517, whole.len() - 6] {
            assert_eq!(parse(&in_records_of(size, &whole)), expected, "records of {size} bytes");
        }
    }

    #[test]
    fn what_follows_a_hello_does_not_matter() {
        let expected = parse(&mesh());
        for after in [&b"\x17\x03\x03\x00\x04data"[..], b"\x14\x03\x03\x00\x01\x01", b"garbage"] {
            assert_eq!(parse(&[&mesh(), after].concat()), expected);
        }
    }

    #[test]
    fn a_hello_that_is_too_large_is_refused_as_soon_as_it_says_so() {
        assert_eq!(parse(b"\x16\x03\x01\x10\x00\x01\x00\x40\x00"), Hello::NotParseable);
        // Or, in records of one byte, when there are too many of them.
        let mut endless = b"\x16\x03\x01\x00\x04\x01\x00\x3f\xf0".to_vec();
        while endless.len() < MOST_BYTES {
            assert_eq!(parse(&endless), Hello::NeedMore);
            endless.extend(b"\x16\x03\x01\x00\x01\x00".repeat(100));
        }
        assert_eq!(parse(&endless), Hello::NotParseable);
    }

    #[test]
    fn what_is_no_hello_is_not_parseable() {
        let mut no_extensions = vec![22, 3, 1, 0, 47, 1, 0, 0, 43, 3, 3];
        no_extensions.extend([7; 32]);
        no_extensions.extend([0, 0, 2, 0xc0, 0x2f, 1, 0, 0, 0]);
        for bytes in [&b"GET / HTTP/1.1\r\n"[..], b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", &no_extensions] {
            assert_eq!(parse(bytes), Hello::NotParseable, "{}", bytes.escape_ascii());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, rng_seed: RngSeed::Fixed(15106), ..ProptestConfig::default() })]

        #[test]
        fn a_hello_cut_anywhere_needs_more_and_then_says_the_same(at in any::<prop::sample::Index>(), size in 1usize..600) {
            let bytes = in_records_of(size, &mesh());
            prop_assert_eq!(parse(&bytes[..at.index(bytes.len())]), Hello::NeedMore);
            prop_assert_eq!(parse(&bytes), parse(&mesh()));
        }

        #[test]
        fn a_damaged_hello_has_one_verdict_however_it_is_cut(
            at in any::<prop::sample::Index>(), byte in any::<u8>(), tail in prop::collection::vec(any::<u8>(), 0..50)
        ) {
            let mut bytes = mesh();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes.extend(tail);
            let mut verdict = Hello::NeedMore;
            for len in (0..bytes.len()).step_by(7).chain([bytes.len()]) {
                let now = parse(&bytes[..len]);
                if verdict != Hello::NeedMore {
                    prop_assert_eq!(&now, &verdict, "after {} bytes", len);
                }
                verdict = now;
            }
        }

        #[test]
        fn noise_is_survived(mut bytes in prop::collection::vec(any::<u8>(), 0..2_000), record in any::<bool>()) {
            if record {
                bytes.splice(0..0, [22, 3, 1]);
            }
            parse(&bytes);
        }
    }
}
