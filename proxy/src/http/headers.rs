//! What a proxy does to headers: hop-by-hop ones end here (RFC 9110 §7.6.1), ours never leave the mesh, everything else
//! passes.

use std::time::Duration;

use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER, TRANSFER_ENCODING,
    UPGRADE,
};
use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use http::{Method, Request, StatusCode, Version, request, response};
use hyper::body::Body;
use sheetbend_control_plane_client::model::MOST_ATTEMPTS;

use super::error::Refusal;
use super::known::{Known, says_grpc};
use crate::traffic::outlier::Fault;

/// The HTTP version of the request as the app sent it, when it was not HTTP/2: the far side gives its app the same.
pub const SENT_VERSION: HeaderName = HeaderName::from_static("sheetbend-version");
/// On a response: the request never reached the app. Believed only from a mesh peer.
pub const UNSENT: HeaderName = HeaderName::from_static("sheetbend-unsent");
/// Its value where the app was not asked because it has enough to do: it is well, and no fault of its is to be counted.
pub(crate) const SHED: HeaderValue = HeaderValue::from_static("?1;shed");
/// Its value where the app was asked in HTTP/2 and speaks HTTP/1.1 alone, so that no other would fare better.
pub(crate) const NOT_HTTP2: HeaderValue = HeaderValue::from_static("?0;not-http2");
/// On a request: so many attempts were made before this one. Believed only from a mesh peer.
pub const ATTEMPTS: HeaderName = HeaderName::from_static("sheetbend-attempts-before");
/// On a response: what followed from the request was tried again already, in vain. Believed only from a mesh peer.
pub const IN_VAIN: HeaderName = HeaderName::from_static("sheetbend-retried");
/// The same as gRPC's own clients say it (gRFC A6).
pub const GRPC_ATTEMPTS: HeaderName = HeaderName::from_static("grpc-previous-rpc-attempts");
/// RFC 9209.
pub const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");
/// Made when it is missing; otherwise passed as it came.
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
/// How a gRPC call ended.
pub const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// The trace that a request is part of (W3C Trace Context §3.2).
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// What ends here whoever names it, beside `Connection`.
pub(super) const HOP_BY_HOP: [HeaderName; 6] =
    [KEEP_ALIVE, PROXY_CONNECTION, TE, TRANSFER_ENCODING, UPGRADE, HTTP2_SETTINGS];

/// Every header by which our proxies speak to each other.
pub(super) const OURS: [HeaderName; 4] = [SENT_VERSION, UNSENT, ATTEMPTS, IN_VAIN];

/// A random UUID (RFC 9562 §5.4) of 128 random bits.
pub fn request_id(bits: u128) -> HeaderValue {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let bits = bits & !(0xf << 76) | (4 << 76);
    let bits = bits & !(0x3 << 62) | (2 << 62);
    let mut text = [b'-'; 36];
    let digits = text.iter_mut().enumerate().filter(|(at, _)| ![8, 13, 18, 23].contains(at));
    for (nth, (_, digit)) in digits.enumerate() {
        *digit = HEX[(bits >> (124 - 4 * nth)) as usize & 0xf];
    }
    HeaderValue::from_bytes(&text).unwrap_or(HeaderValue::from_static("-"))
}

/// How many attempts a mesh peer says were made before this one.
pub fn attempts_before(headers: &HeaderMap) -> Option<u32> {
    headers.get(ATTEMPTS)?.to_str().ok()?.parse().ok().filter(|before| *before <= MOST_ATTEMPTS)
}

/// Removes what only mesh peers may say.
pub fn strip_ours(headers: &mut HeaderMap, known: Known) {
    if known.has(Known::OURS) {
        OURS.iter().for_each(|name| drop(headers.remove(name)));
    }
}

/// Removes hop-by-hop headers and whatever `Connection` names. `te: trailers` is put back: gRPC servers ask for it.
pub fn strip_hop_by_hop(headers: &mut HeaderMap, known: Known) {
    if !known.has(Known::HOP_BY_HOP) {
        return;
    }
    let wants_trailers = headers.get(TE).is_some_and(|te| lists(te, "trailers"));
    if known.has(Known::CONNECTION) {
        // Allocates only where Connection names more than what goes anyway.
        let named: Vec<HeaderName> = headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|token| HeaderName::from_bytes(token.trim().as_bytes()).ok())
            .filter(|name| !is_hop_by_hop(name) && may_be_nominated(name))
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
    }
    HOP_BY_HOP.iter().for_each(|name| drop(headers.remove(name)));
    if wants_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// Headers that frame or route a message are never hop-by-hop, whatever `Connection` claims: removing them at one hop
/// makes two hops disagree about the message.
fn may_be_nominated(name: &HeaderName) -> bool {
    *name != CONTENT_LENGTH && *name != HOST && *name != TRAILER && *name != X_REQUEST_ID
}

fn is_hop_by_hop(name: &HeaderName) -> bool {
    [CONNECTION, KEEP_ALIVE, PROXY_CONNECTION, TE, TRANSFER_ENCODING, UPGRADE].contains(name)
}

/// Whether a comma-separated header value has `token`, in any case.
pub fn lists(value: &HeaderValue, token: &str) -> bool {
    value.to_str().is_ok_and(|text| text.split(',').any(|part| part.trim().eq_ignore_ascii_case(token)))
}

/// Makes one `cookie` of those that HTTP/2 may send one by one, before anybody reads it as HTTP/1.1 has it (RFC 9113 §8.2.3).
pub fn join_cookies(head: &mut request::Parts, known: Known) {
    if head.version < Version::HTTP_2 || !known.has(Known::COOKIE) {
        return;
    }
    let crumbs = head.headers.get_all(COOKIE);
    if crumbs.iter().nth(1).is_none() {
        return;
    }
    let joined = crumbs.iter().map(HeaderValue::as_bytes).collect::<Vec<_>>().join(&b"; "[..]);
    // What was valid one by one is valid together.
    if let Ok(mut joined) = HeaderValue::from_bytes(&joined) {
        joined.set_sensitive(crumbs.iter().any(HeaderValue::is_sensitive));
        head.headers.insert(COOKIE, joined);
    }
}

/// What RFC 9112 §6.3 and §3.2 want refused before anybody forwards the message.
///
/// A request with both `Transfer-Encoding` and `Content-Length` could mean two different things to two servers.
pub fn check_framing(head: &request::Parts, known: Known) -> Result<(), Refusal> {
    if head.version >= Version::HTTP_2 {
        return Ok(());
    }
    let headers = &head.headers;
    if known.has(Known::TRANSFER_ENCODING) {
        if headers.contains_key(CONTENT_LENGTH) {
            return Err(Refusal::Smuggling("both Transfer-Encoding and Content-Length"));
        }
        if !is_chunked(headers) {
            return Err(Refusal::Smuggling(OTHER_CODING));
        }
    }
    let mut hosts = headers.get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (_, Some(_)) => Err(Refusal::Malformed("more than one Host header")),
        (None, None) if head.version == Version::HTTP_11 && head.uri.authority().is_none() => {
            Err(Refusal::Malformed("no Host header"))
        }
        _ => Ok(()),
    }
}

/// What could be read differently further on, or makes no sense there. Where both say how long an answer is, the chunks are
/// right (RFC 9112 §6.3).
///
/// # Errors
///
/// What is wrong with it.
pub fn check_answer(head: &mut response::Parts, known: Known, upgrade: bool) -> Result<(), &'static str> {
    if head.status == StatusCode::SWITCHING_PROTOCOLS && !upgrade {
        return Err("a change of protocols that nobody asked for");
    }
    if known.has(Known::TRANSFER_ENCODING) {
        if !is_chunked(&head.headers) {
            return Err(OTHER_CODING);
        }
        head.headers.remove(CONTENT_LENGTH);
    }
    Ok(())
}

/// A proxy that is itself a service of the mesh is spoken to over a connection of bytes.
pub(crate) const NO_CONNECT: &str =
    "CONNECT is for the mesh's own proxy; declare the port of a service that is a proxy as appProtocol tcp";

const OTHER_CODING: &str = "a transfer coding other than a single `chunked`";

/// Whether that is the one transfer coding there is.
fn is_chunked(headers: &HeaderMap) -> bool {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    codings.next().is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"chunked")) && codings.next().is_none()
}

/// How long a server says that it keeps a connection with nothing on it (RFC 2068 §19.7.1.1).
pub fn keep_alive(headers: &HeaderMap) -> Option<Duration> {
    let parameters = headers.get(KEEP_ALIVE)?.to_str().ok()?.split(',');
    let timeout = parameters.filter_map(|one| one.trim().split_once('=')).find(|(name, _)| name.trim() == "timeout")?;
    timeout.1.trim().parse().ok().map(Duration::from_secs)
}

/// Whether the client asks to leave HTTP behind on this connection.
pub fn asks_upgrade(head: &request::Parts, known: Known) -> bool {
    head.version == Version::HTTP_11
        && known.has(Known::UPGRADE)
        && head.headers.get_all(CONNECTION).iter().any(|value| lists(value, "upgrade"))
        // h2c by upgrade is optional for servers (and gone from RFC 9113): the request is served as it stands.
        && !head.headers.get_all(UPGRADE).iter().any(|value| lists(value, "h2c"))
}

/// Whether the client waits for `100 Continue` before it sends the body. On HTTP/2 hyper has no way to tell it.
pub fn expects_continue(head: &request::Parts, known: Known) -> bool {
    head.version < Version::HTTP_2
        && known.has(Known::EXPECT)
        && head
            .headers
            .get(http::header::EXPECT)
            .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// The authority a request names: its target's, or its Host.
pub fn authority(head: &request::Parts) -> Option<Authority> {
    match head.uri.authority() {
        Some(authority) => Some(authority.clone()),
        None => head.headers.get(HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok()),
    }
}

/// What differs from request to request, and would fill the table of HTTP/2's header compression with values that never
/// come again, each of which is compared with the next.
const UNIQUE: [HeaderName; 2] = [X_REQUEST_ID, HeaderName::from_static("traceparent")];

/// Gives a request the form that HTTP/2 wants: scheme and authority in the target, no Host.
pub fn to_h2(head: &mut request::Parts, authority: Authority) -> Result<(), Refusal> {
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(authority);
    parts.path_and_query = Some(path_and_query(head));
    head.uri = Uri::from_parts(parts).map_err(|_| Refusal::Malformed("the request target is not valid"))?;
    head.headers.remove(HOST);
    for name in &UNIQUE {
        if let Some(value) = head.headers.get_mut(name) {
            // A literal that is never indexed (RFC 7541 §6.2.3).
            value.set_sensitive(true);
        }
    }
    head.version = Version::HTTP_2;
    Ok(())
}

/// Gives a request the form that HTTP/1.1 wants: origin-form and a Host (RFC 9112 §3.2.1).
pub fn to_h1(head: &mut request::Parts, authority: &Authority) -> Result<(), Refusal> {
    let host =
        HeaderValue::try_from(authority.as_str()).map_err(|_| Refusal::Malformed("the authority is not valid"))?;
    // Absolute-form wins over a Host that says something else (RFC 9112 §3.2.2).
    head.headers.insert(HOST, host);
    let target = path_and_query(head);
    head.uri = Uri::from(target);
    head.version = Version::HTTP_11;
    Ok(())
}

/// Says that a body follows of which nobody knows the length. For want of a word hyper takes a `GET` or a `HEAD` to have
/// none.
pub(crate) fn say_length(request: &mut Request<impl Body>) {
    let unknown = !request.body().is_end_stream() && request.body().size_hint().exact().is_none();
    if unknown
        && matches!(*request.method(), Method::GET | Method::HEAD)
        && !request.headers().contains_key(CONTENT_LENGTH)
    {
        request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
}

fn path_and_query(head: &request::Parts) -> PathAndQuery {
    match head.uri.path_and_query() {
        Some(target) if !target.as_str().is_empty() => target.clone(),
        // `OPTIONS http://host` without a path asks about the server itself (RFC 9112 §3.2.4).
        _ if head.method == Method::OPTIONS => PathAndQuery::from_static("*"),
        _ => PathAndQuery::from_static("/"),
    }
}

/// Methods that may be sent again without a second effect (RFC 9110 §9.2.2), or that say so themselves.
pub fn is_idempotent(head: &request::Parts) -> bool {
    matches!(head.method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE)
        || head.headers.contains_key("idempotency-key")
}

/// Whether the request is a gRPC call (gRPC over HTTP/2, "Requests").
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(http::header::CONTENT_TYPE).is_some_and(says_grpc)
}

/// The gRPC status of a call that took longer than its caller was ready to wait.
pub(crate) const GRPC_DEADLINE_EXCEEDED: u16 = 4;

/// How a server failed that answers with this gRPC status, if it does not say that its caller asked for the wrong thing:
/// UNKNOWN, INTERNAL, DATA_LOSS, and UNAVAILABLE, which is 503 (gRPC "Status codes and their use").
pub(crate) fn grpc_fault(status: u16) -> Option<Fault> {
    match status {
        14 => Some(Fault::Gateway),
        2 | 13 | 15 => Some(Fault::Answer),
        _ => None,
    }
}

/// `grpc-status` of a trailer section or of the head of an answer without a body.
pub fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get(GRPC_STATUS)?.to_str().ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &[(&str, &str)]) -> request::Parts {
        let mut request = http::Request::builder().method("GET").uri("/a?b=c").version(Version::HTTP_11);
        for (name, value) in text {
            request = request.header(*name, *value);
        }
        request.body(()).expect("a request").into_parts().0
    }

    fn known(head: &request::Parts) -> Known {
        Known::of(&head.headers)
    }

    #[test]
    fn a_server_says_for_how_long_it_keeps_a_connection() {
        let said = |value| keep_alive(&HeaderMap::from_iter([(KEEP_ALIVE, HeaderValue::from_static(value))]));
        assert_eq!(said("timeout=5, max=100"), Some(Duration::from_secs(5)));
        assert_eq!(said("max=100,timeout=1"), Some(Duration::from_secs(1)));
        for nothing in ["", "timeout", "timeout=soon", "timeout=-1", "max=3"] {
            assert_eq!(said(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn a_request_id_is_a_random_uuid() {
        let bits = 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef;
        assert_eq!(request_id(bits), "01234567-89ab-4def-8123-456789abcdef");
        assert_eq!(request_id(u128::MAX), "ffffffff-ffff-4fff-bfff-ffffffffffff");
    }

    #[test]
    fn hop_by_hop_headers_end_here_and_te_trailers_is_put_back() {
        let mut head = head(&[
            ("connection", "keep-alive, X-Private, close"),
            ("x-private", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "gzip, trailers"),
            ("traceparent", "00-aa-bb-01"),
        ]);
        let known = known(&head);
        strip_hop_by_hop(&mut head.headers, known);
        assert_eq!(head.headers.len(), 2);
        assert_eq!(head.headers["te"], "trailers");
        assert_eq!(head.headers["traceparent"], "00-aa-bb-01");
    }

    #[test]
    fn connection_cannot_take_away_what_frames_the_message() {
        let mut head = head(&[("connection", "content-length, host"), ("content-length", "3"), ("host", "web")]);
        let known = known(&head);
        strip_hop_by_hop(&mut head.headers, known);
        assert_eq!(head.headers["content-length"], "3");
        assert_eq!(head.headers["host"], "web");
    }

    #[test]
    fn cookies_that_came_one_by_one_are_one_for_whoever_reads_them() {
        let crumbs = head(&[("cookie", "a=1"), ("host", "web"), ("cookie", "b=2; c=3")]);
        let joined = |version| {
            let mut head = crumbs.clone();
            head.version = version;
            let known = known(&head);
            join_cookies(&mut head, known);
            head.headers
                .get_all("cookie")
                .iter()
                .map(|value| value.to_str().expect("text").to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(joined(Version::HTTP_2), ["a=1; b=2; c=3"]);
        assert_eq!(joined(Version::HTTP_11), ["a=1", "b=2; c=3"], "as it came");
    }

    #[test]
    fn ambiguous_framing_is_refused() {
        let both = head(&[("host", "web"), ("transfer-encoding", "chunked"), ("content-length", "3")]);
        assert!(matches!(check_framing(&both, known(&both)), Err(Refusal::Smuggling(_))));
        let strange = head(&[("host", "web"), ("transfer-encoding", "gzip, chunked")]);
        assert!(matches!(check_framing(&strange, known(&strange)), Err(Refusal::Smuggling(_))));
        let twice = head(&[("host", "web"), ("host", "other")]);
        assert!(matches!(check_framing(&twice, known(&twice)), Err(Refusal::Malformed(_))));
        let chunked = head(&[("host", "web"), ("transfer-encoding", "chunked")]);
        assert!(check_framing(&chunked, known(&chunked)).is_ok());
    }

    #[test]
    fn a_request_keeps_its_target_through_both_forms() {
        let mut head = head(&[("host", "web:80")]);
        let authority = authority(&head).expect("an authority");
        to_h2(&mut head, authority.clone()).expect("a valid form");
        assert_eq!(head.uri, "http://web:80/a?b=c");
        to_h1(&mut head, &authority).expect("a valid form");
        assert_eq!(head.uri, "/a?b=c");
        assert_eq!(head.headers["host"], "web:80");
    }

    #[test]
    fn what_never_comes_again_is_not_indexed_by_header_compression() {
        let mut head =
            head(&[("host", "web"), ("x-request-id", "1"), ("traceparent", "00-aa-bb-01"), ("accept", "*/*")]);
        let authority = authority(&head).expect("an authority");
        to_h2(&mut head, authority).expect("a valid form");
        let unique: Vec<bool> =
            ["x-request-id", "traceparent", "accept"].iter().map(|name| head.headers[*name].is_sensitive()).collect();
        assert_eq!(unique, [true, true, false]);
    }
}
