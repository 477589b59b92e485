//! `sheetbend breakers`: which endpoints are ejected, why, and when they are tried again.
//!
//! A proxy judges for itself: what one has ejected, another may still use. Without `--proxy` all sidecars of this user
//! that run here are asked.

mod operator;
mod watch;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Deserialize;
use serde_json::Value;
use sheetbend_control_plane_client::admin_http::{self, AskError};

use crate::Failure;
use crate::run::record;

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    act: Option<operator::Act>,

    /// Admin ports of proxies to ask: http://HOST:PORT [default: those of the sidecars that run here]
    #[arg(long, value_name = "URL", num_args = 1.., value_delimiter = ',')]
    proxy: Vec<String>,

    /// The form of the answer
    #[arg(short, long, value_name = "FORM", default_value = "table")]
    output: Output,

    /// Go on with a line for each change, until Ctrl-C; with `-o json` an object for each
    #[arg(long, short)]
    watch: bool,

    /// Where `run` keeps the mesh of this user [default: $XDG_STATE_HOME/sheetbend, ~/.local/state/sheetbend]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Table,
    Json,
}

/// What one proxy says.
struct Said {
    proxy: String,
    breakers: Vec<Value>,
}

/// The part of an endpoint that a table shows.
#[derive(Deserialize)]
struct Row {
    backend: String,
    endpoint: String,
    state: String,
    reason: Option<String>,
    since: Option<String>,
    next_probe: Option<String>,
    requests: u32,
    failures: u32,
}

pub(crate) fn run(args: Args) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    if let Some(act) = &args.act {
        return runtime.block_on(operator::tell(act)).map(|()| ExitCode::SUCCESS);
    }
    if args.watch {
        return runtime.block_on(watch::run(&args));
    }
    match print(&runtime.block_on(ask(&args))?, args.output) {
        // `| head` has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(format!("cannot write the answer: {error}")))
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

async fn ask(args: &Args) -> Result<Vec<Said>, Failure> {
    let (mut said, mut silent) = (Vec::new(), None);
    for (name, url) in proxies(&args.proxy, args.state_dir.as_deref())? {
        let answer = match admin_http::get(&url, "/breakers").await {
            Ok(answer) => answer,
            Err(error) => {
                silent = Some(go_on(&name, error)?);
                continue;
            }
        };
        let document: Value = serde_json::from_slice(&answer).unwrap_or_default();
        let Some(breakers) = document["endpoints"].as_array() else {
            return Err(Failure::new(format!("{url} answers, but not with breakers: it is no proxy's admin port")));
        };
        said.push(Said { proxy: name, breakers: breakers.clone() });
    }
    somebody(said, silent)
}

/// One of several does not answer: that is said, and the others are asked.
pub(crate) fn go_on(proxy: &str, error: AskError) -> Result<Failure, Failure> {
    match error {
        AskError::Url(_) => Err(failure(error)),
        silent => {
            eprintln!("{proxy}: {silent}");
            Ok(Failure::new("none of the proxies answers"))
        }
    }
}

/// What was said, if anybody said anything.
pub(crate) fn somebody<T>(said: Vec<T>, silent: Option<Failure>) -> Result<Vec<T>, Failure> {
    match silent {
        Some(silent) if said.is_empty() => Err(silent),
        _ => Ok(said),
    }
}

/// Name and admin port of everybody who is asked: those that are named, or the sidecars that run here.
fn proxies(named: &[String], state_dir: Option<&Path>) -> Result<Vec<(String, String)>, Failure> {
    if !named.is_empty() {
        return Ok(named.iter().map(|url| (url.clone(), url.clone())).collect());
    }
    let state = state_dir.map(Path::to_path_buf).or_else(crate::run::default_state_dir);
    let running = state.as_deref().map(record::running).unwrap_or_default();
    if running.is_empty() {
        let place = state.map_or("no state folder".to_string(), |dir| dir.display().to_string());
        return Err(Failure::new(format!(
            "no sidecar runs here (looked in {place})\n\
             start one with `sheetbend run`, or name an admin port: --proxy http://127.0.0.1:PORT"
        )));
    }
    Ok(running.into_iter().map(|proxy| (proxy.service, proxy.admin)).collect())
}

fn failure(error: AskError) -> Failure {
    match error {
        AskError::Url(_) => Failure::usage(format!("--proxy: {error}")),
        _ => Failure::new(error),
    }
}

fn print(said: &[Said], output: Output) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match output {
        Output::Table => write!(out, "{}", table(said))?,
        Output::Json => {
            let all: Vec<Value> = said
                .iter()
                .map(|said| serde_json::json!({ "proxy": said.proxy, "endpoints": said.breakers }))
                .collect();
            writeln!(out, "{:#}", Value::Array(all))?;
        }
    }
    out.flush()
}

fn table(said: &[Said]) -> String {
    const TITLES: [&str; 8] =
        ["PROXY", "BACKEND", "ENDPOINT", "STATE", "REASON", "SINCE", "NEXT PROBE", "FAILED LATELY"];
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_string());
    let mut rows = vec![TITLES.map(str::to_string)];
    for Said { proxy, breakers } in said {
        let known = breakers.iter().filter_map(|one| Row::deserialize(one).ok());
        rows.extend(known.map(|row| {
            let failed = format!("{} of {}", row.failures, row.requests);
            let (reason, since, next) = (or_dash(row.reason), or_dash(row.since), or_dash(row.next_probe));
            [proxy.clone(), row.backend, row.endpoint, row.state, reason, since, next, failed]
        }));
    }
    if rows.len() == 1 {
        return "No endpoint of the mesh has been called yet.\n".to_string();
    }
    let widths: Vec<usize> =
        (0..TITLES.len()).map(|at| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0)).collect();
    let line = |row: &[String; 8]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}  "));
        format!("{}\n", cells.collect::<String>().trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_table_says_what_is_ejected_and_why() {
        let ejected = json!({
            "backend": "web.default:80", "endpoint": "10.0.0.1:80", "state": "Ejected", "reason": "success_rate",
            "since": "2026-01-01T00:00:00Z", "next_probe": "2026-01-01T00:00:02Z", "requests": 40, "failures": 9,
        });
        let text = table(&[Said { proxy: "caller".into(), breakers: vec![ejected] }]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[1].starts_with("caller  web.default:80  10.0.0.1:80  Ejected  success_rate"), "{text}");
        assert!(lines[1].ends_with("9 of 40"), "{text}");
    }

    #[test]
    fn nobody_called_is_said_in_words() {
        let text = table(&[Said { proxy: "caller".into(), breakers: Vec::new() }]);
        assert_eq!(text, "No endpoint of the mesh has been called yet.\n");
    }
}
