//! `sheetbend token`: join tokens.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use sheetbend_control_plane::{StartError, create_token, token};

use crate::Failure;

#[derive(clap::Subcommand)]
pub(crate) enum Verb {
    /// Make a join token: it proves, once and for a while, that its bearer may become one service
    ///
    /// Only the token is printed. The first key that uses it spends it.
    Create(Create),
}

#[derive(clap::Args)]
pub(crate) struct Create {
    /// The CA's folder
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// The service that its bearer becomes
    #[arg(long, value_name = "NAME")]
    service: String,
    /// The namespace of the service
    #[arg(long, value_name = "NAME", default_value = "default")]
    namespace: String,
    /// How long it is good for: 90s, 10m, 2h; at most 24h
    #[arg(long, value_name = "TIME", default_value = "10m")]
    ttl: String,
}

pub(crate) fn run(verb: Verb) -> Result<ExitCode, Failure> {
    let Verb::Create(create) = verb;
    let ttl = ttl(&create.ttl).map_err(Failure::usage)?;
    match create_token(&create.dir, &create.service, &create.namespace, ttl) {
        Ok(token) => {
            println!("{token}");
            Ok(ExitCode::SUCCESS)
        }
        Err(StartError::Invalid(problems)) => Err(Failure::usage(problems.join("\n       "))),
        Err(error) => Err(Failure::new(error)),
    }
}

/// `90s`, `10m`, `2h`.
fn ttl(text: &str) -> Result<Duration, String> {
    let wrong = || format!("--ttl {text}: write a number and s, m or h, for example 10m");
    let unit = text.chars().last().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        _ => return Err(wrong()),
    };
    let number: u64 = text.strip_suffix(unit).and_then(|n| n.parse().ok()).ok_or_else(wrong)?;
    match number.checked_mul(seconds).map(Duration::from_secs) {
        Some(ttl) if ttl.is_zero() => {
            Err(format!("--ttl {text}: a token that is good for no time is good for nothing"))
        }
        Some(ttl) if ttl <= token::MAX_TTL => Ok(ttl),
        _ => Err(format!("--ttl {text}: 24h is the longest")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ttl_has_a_unit_and_an_end() {
        assert_eq!(ttl("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(ttl("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(ttl("24h"), Ok(token::MAX_TTL));
        for wrong in ["", "10", "m", "0s", "25h", "1d", "-1m", "99999999999999999999h", "1é"] {
            assert!(ttl(wrong).is_err(), "{wrong}");
        }
    }
}
