//! Which of the headers that mean something to a proxy are there.

use http::header::{HeaderMap, HeaderValue};

/// What was found in one pass over a message's headers, which costs less than two searches for one name. A message has few
/// headers, and of those that are looked for hardly any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known(u32);

impl Known {
    /// `connection`.
    pub const CONNECTION: Self = Self(1);
    /// `te`.
    pub const TE: Self = Self(1 << 1);
    /// `transfer-encoding`.
    pub const TRANSFER_ENCODING: Self = Self(1 << 2);
    /// `upgrade`.
    pub const UPGRADE: Self = Self(1 << 3);
    /// `keep-alive`, `proxy-connection`, `http2-settings`.
    pub const OTHER_HOP_BY_HOP: Self = Self(1 << 4);
    /// What is meant for one hop alone.
    pub const HOP_BY_HOP: Self =
        Self(Self::CONNECTION.0 | Self::TE.0 | Self::TRANSFER_ENCODING.0 | Self::UPGRADE.0 | Self::OTHER_HOP_BY_HOP.0);
    /// What proxies of ours tell each other.
    pub const OURS: Self = Self(1 << 5);
    /// `expect`.
    pub const EXPECT: Self = Self(1 << 6);
    /// `grpc-timeout`, `x-envoy-expected-rq-timeout-ms`.
    pub const DEADLINE: Self = Self(1 << 7);
    /// `traceparent`.
    pub const TRACE: Self = Self(1 << 8);
    /// `x-request-id`.
    pub const REQUEST_ID: Self = Self(1 << 9);
    /// A `content-type` that says gRPC.
    pub const GRPC: Self = Self(1 << 10);
    /// `grpc-status`.
    pub const GRPC_STATUS: Self = Self(1 << 11);
    /// `grpc-previous-rpc-attempts`.
    pub const GRPC_ATTEMPTS: Self = Self(1 << 12);
    /// `cookie`.
    pub const COOKIE: Self = Self(1 << 13);
    /// Any `content-type`, of which the first counts.
    const TYPED: Self = Self(1 << 14);

    /// Those of a message.
    pub fn of(headers: &HeaderMap) -> Self {
        headers.iter().fold(Self(0), |found, (name, value)| match Self::one(name.as_str(), value) {
            typed if typed.has(Self::TYPED) && found.has(Self::TYPED) => found,
            one => Self(found.0 | one.0),
        })
    }

    fn one(name: &str, value: &HeaderValue) -> Self {
        match name {
            "connection" => Self::CONNECTION,
            "te" => Self::TE,
            "transfer-encoding" => Self::TRANSFER_ENCODING,
            "upgrade" => Self::UPGRADE,
            "keep-alive" | "proxy-connection" | "http2-settings" => Self::OTHER_HOP_BY_HOP,
            "sheetbend-version" | "sheetbend-unsent" | "sheetbend-attempts-before" | "sheetbend-retried" => Self::OURS,
            "expect" => Self::EXPECT,
            "grpc-timeout" | "x-envoy-expected-rq-timeout-ms" => Self::DEADLINE,
            "traceparent" => Self::TRACE,
            "x-request-id" => Self::REQUEST_ID,
            "content-type" if says_grpc(value) => Self(Self::TYPED.0 | Self::GRPC.0),
            "content-type" => Self::TYPED,
            "cookie" => Self::COOKIE,
            "grpc-status" => Self::GRPC_STATUS,
            "grpc-previous-rpc-attempts" => Self::GRPC_ATTEMPTS,
            _ => Self(0),
        }
    }

    /// Whether any of these is there.
    pub fn has(self, any: Self) -> bool {
        self.0 & any.0 != 0
    }
}

/// Whether a content type is that of a gRPC call (not gRPC-Web).
pub(super) fn says_grpc(value: &HeaderValue) -> bool {
    let value = value.as_bytes();
    value.starts_with(b"application/grpc") && !value.starts_with(b"application/grpc-web")
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;
    use crate::http::{deadline, headers};

    fn of(name: &HeaderName, value: &'static str) -> Known {
        Known::of(&HeaderMap::from_iter([(name.clone(), HeaderValue::from_static(value))]))
    }

    #[test]
    fn every_name_that_is_looked_for_by_what_was_found_is_found() {
        for name in headers::HOP_BY_HOP.iter().chain([&http::header::CONNECTION]) {
            assert!(of(name, "x").has(Known::HOP_BY_HOP), "{name}");
        }
        headers::OURS.iter().for_each(|name| assert!(of(name, "x").has(Known::OURS), "{name}"));
        for (name, known) in [
            (http::header::CONNECTION, Known::CONNECTION),
            (http::header::TE, Known::TE),
            (http::header::TRANSFER_ENCODING, Known::TRANSFER_ENCODING),
            (http::header::UPGRADE, Known::UPGRADE),
            (http::header::EXPECT, Known::EXPECT),
            (deadline::EXPECTED, Known::DEADLINE),
            (deadline::GRPC_TIMEOUT, Known::DEADLINE),
            (headers::TRACEPARENT, Known::TRACE),
            (headers::X_REQUEST_ID, Known::REQUEST_ID),
            (headers::GRPC_STATUS, Known::GRPC_STATUS),
            (headers::GRPC_ATTEMPTS, Known::GRPC_ATTEMPTS),
            (http::header::COOKIE, Known::COOKIE),
        ] {
            assert_eq!(of(&name, "x").0 & known.0, known.0, "{name}");
        }
        let typed = |value| of(&http::header::CONTENT_TYPE, value);
        assert!(typed("application/grpc+proto").has(Known::GRPC) && !typed("application/grpc-web").has(Known::GRPC));
        assert_eq!(of(&http::header::ACCEPT, "application/grpc"), Known(0));
        let mut twice = HeaderMap::new();
        twice.append(http::header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        twice.append(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        assert!(!Known::of(&twice).has(Known::GRPC), "the first one counts, as everywhere");
    }
}
