//! Why a response is what it is: Envoy's response flags, and a few of our own where Envoy has no word.

use std::fmt;
use std::ops::{BitOr, BitOrAssign};

/// A set of response flags. Shown in Envoy's letters (`UF,URX`), or as `-` when empty.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Flags(u32);

macro_rules! flags {
    ($($name:ident = $bit:literal, $letters:literal, $words:literal;)+) => {
        impl Flags {
            $(
                #[doc = concat!("`", $letters, "`: ", $words, ".")]
                pub const $name: Self = Self(1 << $bit);
            )+
            const ALL: &'static [(Self, &'static str, &'static str)] = &[$((Self::$name, $letters, $words),)+];
        }
    };
}

flags! {
    NO_HEALTHY_UPSTREAM = 0, "UH", "no endpoint is ready";
    UPSTREAM_CONNECT_FAILURE = 1, "UF", "the connection to the endpoint failed";
    UPSTREAM_OVERFLOW = 2, "UO", "a limit of the destination is reached";
    NO_ROUTE = 3, "NR", "no route matches";
    RETRIES_EXHAUSTED = 4, "URX", "every attempt failed";
    UPSTREAM_TIMEOUT = 5, "UT", "the endpoint did not answer in time";
    UPSTREAM_CONNECTION_CLOSED = 6, "UC", "the endpoint closed the connection";
    LOCAL_RESET = 7, "LR", "this proxy reset the stream";
    UPSTREAM_RESET = 8, "UR", "the endpoint reset the stream";
    DOWNSTREAM_CLOSED = 9, "DC", "the caller went away";
    RATE_LIMITED = 10, "RL", "the rate limit is reached";
    DOWNSTREAM_PROTOCOL_ERROR = 11, "DPE", "the caller broke the protocol";
    UPSTREAM_PROTOCOL_ERROR = 12, "UPE", "the endpoint broke the protocol";
    NO_CLUSTER = 13, "NC", "the destination is unknown";
    DENIED = 14, "UAEX", "the caller is not allowed";
    INVALID_HEADERS = 15, "IH", "a header is not valid";
    DURATION_TIMEOUT = 16, "DT", "the request or connection took longer than it may";
    STREAM_IDLE_TIMEOUT = 17, "SI", "nothing moved for too long";
    OVERLOADED = 18, "OM", "this proxy is short of memory or files";
    NO_DISCOVERY = 19, "ND", "the control plane has not said where the destination is";
    NO_IDENTITY = 20, "NI", "this proxy has no valid certificate";
    PEER_REFUSED = 21, "PI", "the peer's certificate is not the one that is expected";
    LOOP = 22, "LD", "the request would come back to this proxy";
    DRAINING = 23, "DR", "this proxy is shutting down";
    DELAY_INJECTED = 24, "DI", "the request was delayed on purpose";
    FAULT_INJECTED = 25, "FI", "the request was answered with a failure on purpose";
    CIRCUIT_OPEN = 26, "CB", "the circuit breaker of the destination is open";
}

impl Flags {
    /// No flag.
    pub const NONE: Self = Self(0);

    /// Flags that blame the destination or the way to it; the caller's own going away does not, nor what was done on purpose.
    const FAILURES: Self = Self(
        !(Self::DOWNSTREAM_CLOSED.0
            | Self::DOWNSTREAM_PROTOCOL_ERROR.0
            | Self::DELAY_INJECTED.0
            | Self::FAULT_INJECTED.0),
    );

    /// Whether no flag is set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether every flag of `other` is set here.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether something failed that was not the caller's doing.
    pub fn is_failure(self) -> bool {
        self.0 & Self::FAILURES.0 != 0
    }

    /// Whether a fault was injected.
    pub fn is_injected(self) -> bool {
        self.0 & (Self::DELAY_INJECTED.0 | Self::FAULT_INJECTED.0) != 0
    }

    /// The bits, 32 of them.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// The same in plain words, `; ` between them; empty when no flag is set.
    pub fn words(self) -> Words {
        Words(self)
    }
}

/// [`Flags`] in plain words.
#[derive(Clone, Copy, Debug)]
pub struct Words(Flags);

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for (_, _, words) in Flags::ALL.iter().filter(|(flag, ..)| self.0.contains(*flag)) {
            write!(f, "{}{words}", if std::mem::take(&mut first) { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl BitOr for Flags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Flags {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("-");
        }
        let mut first = true;
        for (_, letters, _) in Self::ALL.iter().filter(|(flag, ..)| self.contains(*flag)) {
            write!(f, "{}{letters}", if std::mem::take(&mut first) { "" } else { "," })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Flags({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_shown_in_envoys_letters_and_in_words() {
        let flags = Flags::RETRIES_EXHAUSTED | Flags::UPSTREAM_CONNECT_FAILURE;
        assert_eq!(flags.to_string(), "UF,URX");
        assert_eq!(flags.words().to_string(), "the connection to the endpoint failed; every attempt failed");
        assert_eq!(Flags::NONE.to_string(), "-");
        assert_eq!(Flags::NONE.words().to_string(), "");
    }

    #[test]
    fn a_caller_that_left_is_no_failure_of_the_destination() {
        assert!(!Flags::DOWNSTREAM_CLOSED.is_failure());
        assert!((Flags::DOWNSTREAM_CLOSED | Flags::UPSTREAM_TIMEOUT).is_failure());
    }

    #[test]
    fn every_flag_has_a_bit_and_letters_of_its_own() {
        for (i, a) in Flags::ALL.iter().enumerate() {
            for b in &Flags::ALL[i + 1..] {
                assert!(a.0 != b.0 && a.1 != b.1, "{} and {}", a.1, b.1);
            }
        }
    }
}
