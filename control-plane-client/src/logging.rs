//! What this process says of itself, on stderr, and the filter that an operator changes while it runs.

use std::io;
use std::sync::{Mutex, OnceLock, PoisonError};

use http::{Method, StatusCode};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use crate::admin_http::{Answer, Asked};

/// The filter in use. One a process, as logging itself is.
struct Filter {
    handle: reload::Handle<EnvFilter, Registry>,
    text: Mutex<String>,
}

static FILTER: OnceLock<Filter> = OnceLock::new();

/// Starts logging to stderr with this filter, written as `RUST_LOG` is. Asked again, it does nothing.
pub fn install(filter: &str) -> Result<(), String> {
    let (layer, handle) = reload::Layer::new(parse(filter)?);
    let subscriber = tracing_subscriber::registry().with(layer).with(fmt::layer().with_writer(io::stderr));
    if subscriber.try_init().is_ok() {
        let _ = FILTER.set(Filter { handle, text: Mutex::new(filter.to_string()) });
    }
    Ok(())
}

/// The filter in use; empty where somebody else set up the logging.
pub fn filter() -> String {
    let text = FILTER.get().map(|filter| filter.text.lock().unwrap_or_else(PoisonError::into_inner).clone());
    text.unwrap_or_default()
}

/// Logs by another filter from now on, or says what is wrong with it.
pub fn set_filter(text: &str) -> Result<(), String> {
    let new = parse(text)?;
    let Some(filter) = FILTER.get() else { return Err("the log filter of this process is fixed".to_string()) };
    filter.handle.reload(new).map_err(|error| error.to_string())?;
    *filter.text.lock().unwrap_or_else(PoisonError::into_inner) = text.to_string();
    tracing::warn!(filter = text, "the log filter was changed");
    Ok(())
}

/// The answer of `/logging`: GET says the filter in use; POST takes a new one as its body or as `?level=`.
pub fn answer(asked: &Asked, now: impl Fn() -> String, set: impl Fn(&str) -> Result<(), String>) -> Answer {
    if asked.method == Method::GET {
        return Answer::text(StatusCode::OK, format!("{}\n", now()));
    }
    let body = String::from_utf8_lossy(&asked.body);
    let filter = asked.parameter("level").unwrap_or(body.trim());
    if filter.is_empty() {
        let usage = "Say which: a level (error, warn, info, debug, trace), or a filter as RUST_LOG takes it.\n";
        return Answer::text(StatusCode::BAD_REQUEST, usage);
    }
    match set(filter) {
        Ok(()) => Answer::text(StatusCode::OK, format!("{}\n", now())),
        Err(why) => Answer::text(StatusCode::BAD_REQUEST, format!("{why}\n")),
    }
}

fn parse(text: &str) -> Result<EnvFilter, String> {
    let wrong =
        |why: String| format!("`{}` is no log filter: {why}; write a level, or TARGET=LEVEL", text.escape_debug());
    if text.len() > 1024 || !text.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
        return Err(wrong("1,024 printable characters at most".to_string()));
    }
    // A lone word is a level: what is not one would be taken for the name of a module, and silence everything.
    let word = text.bytes().all(|b| b.is_ascii_alphanumeric());
    if word && text.parse::<tracing::Level>().is_err() && !text.eq_ignore_ascii_case("off") {
        return Err(wrong("levels are off, error, warn, info, debug and trace".to_string()));
    }
    EnvFilter::try_new(text).map_err(|error| wrong(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_or_a_filter_is_taken_and_a_slip_is_refused() {
        for right in ["info", "DEBUG", "off", "warn,sheetbend_proxy=trace", "sheetbend_proxy::tls=debug"] {
            assert!(parse(right).is_ok(), "{right}");
        }
        for wrong in ["loud", "", "a=loud", "info\nforged"] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_filter_in_use_is_changed_and_told() {
        install("info").unwrap();
        set_filter("debug").unwrap();
        assert_eq!(filter(), "debug");
        assert!(set_filter("loud").is_err());
        assert_eq!(filter(), "debug");
    }
}
