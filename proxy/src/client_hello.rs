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
