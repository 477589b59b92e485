//! Conditions on a request: what a rule looks at, and nothing of how that is found quickly.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use regex::bytes::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

/// Conditions that must all hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Match {
    /// The path without its query.
    #[serde(default)]
    pub path: Option<PathMatch>,
    /// The method, upper case.
    #[serde(default)]
    pub method: Option<Arc<str>>,
    /// Headers; names are lower case, and each is there once.
    #[serde(default)]
    pub headers: Vec<(Arc<str>, TextMatch)>,
    /// Parameters of the query, byte for byte as they stand in the request; each name is there once.
    #[serde(default)]
    pub query: Vec<(Arc<str>, TextMatch)>,
}

/// A condition on the path.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum PathMatch {
    /// The whole path.
    Exact(Arc<str>),
    /// Whole path elements: `/a` matches `/a` and `/a/b`, not `/ab`.
    Prefix(Arc<str>),
    /// The whole path, by a pattern.
    Regex(Pattern),
}

/// A condition on a value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum TextMatch {
    /// The whole value.
    Exact(Arc<str>),
    /// The whole value, by a pattern.
    Regex(Pattern),
}

impl TextMatch {
    /// Whether a value is the one that is wanted.
    pub fn holds(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(exact) => value == exact.as_bytes(),
            Self::Regex(pattern) => pattern.is_match(value),
        }
    }
}

/// A regular expression for whole values, compiled once.
///
/// Its syntax is RE2's, as Envoy's is: a look takes time in proportion to the value, whatever the pattern. Classes such as
/// `\w` are of ASCII.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern {
    text: Arc<str>,
    compiled: Regex,
}

/// The longest pattern, the Gateway API's own limit for a path.
pub const MAX_PATTERN: usize = 1_024;
/// The longest value that a pattern is held against: a longer one matches none.
const MAX_VALUE: usize = 8 << 10;
/// What a compiled pattern may weigh: room for a hundred repeated classes. A look takes time in proportion to this and to the
/// value, at worst.
const MAX_COMPILED: usize = 16 << 10;
/// What it may remember of former looks, for each thread that looks: enough that hardly any look is that slow.
const MAX_REMEMBERED: usize = 256 << 10;

impl Pattern {
    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it matches all of `value`, which is `MAX_VALUE` bytes long at most.
    pub fn is_match(&self, value: &[u8]) -> bool {
        value.len() <= MAX_VALUE && self.compiled.is_match(value)
    }
}

impl FromStr for Pattern {
    type Err = BadPattern;

    fn from_str(text: &str) -> Result<Self, BadPattern> {
        if text.len() > MAX_PATTERN {
            return Err(BadPattern(format!("longer than {MAX_PATTERN} bytes")));
        }
        // By itself first: `a)|(b` must not become whole by what is put around it.
        compile(text)?;
        Ok(Self { text: text.into(), compiled: compile(&format!(r"\A(?:{text})\z"))? })
    }
}

fn compile(text: &str) -> Result<Regex, BadPattern> {
    let mut builder = RegexBuilder::new(text);
    builder.unicode(false).size_limit(MAX_COMPILED).dfa_size_limit(MAX_REMEMBERED);
    builder.build().map_err(|error| {
        BadPattern(match error {
            regex::Error::CompiledTooBig(_) => "too large when compiled: repeat less".to_string(),
            // The reason is the last line, after a drawing of the place.
            error => {
                let text = error.to_string();
                let last = text.lines().last().unwrap_or_default();
                last.strip_prefix("error: ").unwrap_or(last).to_string()
            }
        })
    })
}

/// Why a text is no pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadPattern(String);

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pattern({:?})", self.text)
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.text.to_string()
    }
}

impl TryFrom<String> for Pattern {
    type Error = BadPattern;
    fn try_from(text: String) -> Result<Self, BadPattern> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Pattern {
        text.parse().unwrap()
    }

    #[test]
    fn a_pattern_matches_whole_values() {
        assert!(pattern("/v[0-9]+").is_match(b"/v12"));
        assert!(!pattern("/v[0-9]+").is_match(b"/v12/"));
        assert!(!pattern("/a|/b").is_match(b"/a/b"), "an alternative is anchored too");
        assert!(!pattern("a.b").is_match(b"a\nb") && !pattern("a").is_match(b"a\n"));
        assert!(pattern("caf.+").is_match("café".as_bytes()));
    }

    #[test]
    fn what_is_no_pattern_or_too_large_is_refused_with_its_reason() {
        let reason = |text: &str| text.parse::<Pattern>().unwrap_err().to_string();
        assert!(reason("(a").contains("unclosed group"), "{}", reason("(a"));
        assert!(reason("a)|(b").contains("unopened group"), "{}", reason("a)|(b"));
        assert!(reason(r"(a)\1").contains("backreference"), "{}", reason(r"(a)\1"));
        assert!(reason("(?x)a # b").contains("unclosed group"), "what would hide the anchor is refused");
        assert!(reason("((a{100}){100}){100}").contains("too large"), "{}", reason("((a{100}){100}){100}"));
        assert!(reason(&"a".repeat(MAX_PATTERN + 1)).contains("longer than 1024"));
    }

    #[test]
    fn an_evil_pattern_takes_no_longer_than_a_harmless_one() {
        // Backtracking would take 2^60000 steps here: this test would not end.
        assert!(!pattern("(a*)*b").is_match("a".repeat(60_000).as_bytes()));
        assert!(!pattern("(.*,){20}x").is_match(",".repeat(60_000).as_bytes()));
    }
}
