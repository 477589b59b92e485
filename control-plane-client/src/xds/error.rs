//! Why a message from the other end is refused.

/// What is wrong with a resource, in words that go back to whoever sent it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The payload has another type than the stream said.
    #[error("it is a `{found}`, not a `{wanted}`")]
    WrongType {
        /// The type URL found.
        found: String,
        /// The one that was wanted.
        wanted: &'static str,
    },
    /// The bytes are no such message.
    #[error("it does not decode: {0}")]
    Malformed(String),
    /// A field without which nothing can be made of it.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A field with a value that can not be used.
    #[error("`{field}`: {reason}")]
    Invalid {
        /// Where.
        field: &'static str,
        /// Why.
        reason: String,
    },
    /// More of something than a proxy takes.
    #[error("{count} {what}, at most {most} are taken")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many came.
        count: usize,
        /// How many are taken.
        most: usize,
    },
}

impl DecodeError {
    /// [`DecodeError::Invalid`] from any reason, which is cut to a line's length.
    pub fn invalid(field: &'static str, reason: impl ToString) -> Self {
        Self::Invalid { field, reason: shown(&reason.to_string(), 200) }
    }
}

/// A stranger's text, short and in one line, fit for a log and for an answer.
pub(crate) fn shown(text: &str, most: usize) -> String {
    text.chars().take(most).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
