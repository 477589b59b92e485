//! `sheetbend explain`: every decision made for a request, or those that would be made.
//!
//! Each proxy tells its own part: the caller's sidecar the way out, the destination's the way in. Without `--proxy` all
//! sidecars of this user that run here are asked.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sheetbend_control_plane_client::admin_http::{self, AskError};
use sheetbend_proxy::telemetry::explain::{NO_RULE, plain, text};

use crate::Failure;
use crate::breakers::{go_on, somebody};
use crate::run::record;

#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["request_id", "to", "latest"])))]
pub(crate) struct Args {
    /// The request's `x-request-id`
    #[arg(value_name = "REQUEST-ID")]
    request_id: Option<String>,

    /// Do not send, but decide for a request to HOST:PORT
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "request_id")]
    to: Option<String>,

    /// List the requests that can be told
    #[arg(long, conflicts_with_all = ["request_id", "to"])]
    latest: bool,

    /// A header of the request that is not sent: NAME=VALUE; may be repeated
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header, requires = "to")]
    headers: Vec<(String, String)>,

    /// The method of the request that is not sent
    #[arg(long, value_name = "METHOD", default_value = "GET", requires = "to")]
    method: String,

    /// The path of the request that is not sent, with its query
    #[arg(long, value_name = "PATH", default_value = "/", requires = "to")]
    path: String,

    /// Admin ports of proxies to ask: http://HOST:PORT [default: those of the sidecars that run here]
    #[arg(long, value_name = "URL", num_args = 1.., value_delimiter = ',')]
    proxy: Vec<String>,

    /// The form of the answer
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Output,

    /// Where `run` keeps the mesh of this user [default: $XDG_STATE_HOME/sheetbend, ~/.local/state/sheetbend]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Text,
    Json,
}

/// What one proxy says.
type Said = (String, Value);

pub(crate) fn run(args: Args) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    let proxies = proxies(&args)?;
    let said = match (&args.request_id, &args.to) {
        (Some(id), _) => runtime.block_on(told(&proxies, id))?,
        (None, Some(to)) => runtime.block_on(decided(&proxies, &args, to))?,
        (None, None) => runtime.block_on(listed(&proxies))?,
    };
    let all = || said.iter().map(|(proxy, said)| json!({ "proxy": proxy, "said": said })).collect();
    match (args.output, args.to.is_some(), args.latest) {
        (Output::Json, ..) => println!("{}", plain(&format!("{:#}", Value::Array(all())))),
        (Output::Text, true, _) => print!("{}", plain(&decisions(&said))),
        (Output::Text, _, true) => print!("{}", plain(&list(&said))),
        (Output::Text, _, false) => print!("{}", plain(&stories(&said))),
    }
    Ok(ExitCode::SUCCESS)
}

/// Name and admin port of everybody who is asked.
fn proxies(args: &Args) -> Result<Vec<(String, String)>, Failure> {
    if !args.proxy.is_empty() {
        return Ok(args.proxy.iter().map(|url| (url.clone(), url.clone())).collect());
    }
    let state = args.state_dir.clone().or_else(crate::run::default_state_dir);
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

async fn told(proxies: &[(String, String)], id: &str) -> Result<Vec<Said>, Failure> {
    let good = |c: char| c.is_ascii_graphic() && !"?#%/".contains(c);
    if id.is_empty() || !id.chars().all(good) {
        return Err(Failure::usage(format!("`{id}` is no request id")));
    }
    let (mut said, mut kept, mut silent) = (Vec::new(), String::new(), None);
    for (name, url) in proxies {
        match admin_http::get(url, &format!("/explain/{id}")).await {
            Ok(answer) => said.push((name.clone(), serde_json::from_slice(&answer).unwrap_or_default())),
            Err(AskError::Status(_, status, why)) if status.as_u16() == 404 => kept = why,
            Err(error) => silent = Some(go_on(name, error)?),
        }
    }
    match said.is_empty() {
        true if kept.is_empty() => somebody(said, silent),
        true => Err(Failure::new(format!("asked {} of the mesh's proxies: {}", proxies.len(), kept.trim()))),
        false => Ok(said),
    }
}

async fn listed(proxies: &[(String, String)]) -> Result<Vec<Said>, Failure> {
    let mut said = Vec::new();
    let mut silent = None;
    for (name, url) in proxies {
        match admin_http::get(url, "/explain").await {
            Ok(answer) => said.push((name.clone(), serde_json::from_slice(&answer).unwrap_or_default())),
            Err(error) => silent = Some(go_on(name, error)?),
        }
    }
    somebody(said, silent)
}

/// Asks again while the proxy itself asks the control plane.
async fn decided(proxies: &[(String, String)], args: &Args, to: &str) -> Result<Vec<Said>, Failure> {
    const PATIENCE: Duration = Duration::from_secs(3);
    const PAUSE: Duration = Duration::from_millis(50);
    let headers = joined(&args.headers);
    let asked = json!({ "to": to, "method": args.method, "path": args.path, "headers": headers }).to_string();
    let (mut said, mut silent) = (Vec::new(), None);
    for (name, url) in proxies {
        let until = Instant::now() + PATIENCE;
        let answer = loop {
            match admin_http::post(url, "/explain", asked.clone()).await {
                Err(AskError::Status(_, status, _)) if status.as_u16() == 503 && Instant::now() < until => {
                    tokio::time::sleep(PAUSE).await;
                }
                Err(AskError::Status(_, status, why)) if status.as_u16() == 400 => {
                    return Err(Failure::usage(why.trim()));
                }
                answer => break answer,
            }
        };
        match answer {
            Ok(answer) => said.push((name.clone(), serde_json::from_slice(&answer).unwrap_or_default())),
            Err(error) => silent = Some(go_on(name, error)?),
        }
    }
    somebody(said, silent)
}

/// What came more than once is one value, with commas (RFC 9110 §5.3), as rules see it.
fn joined(headers: &[(String, String)]) -> BTreeMap<String, String> {
    let mut joined: BTreeMap<String, String> = BTreeMap::new();
    for (name, value) in headers {
        let all = joined.entry(name.to_ascii_lowercase()).or_default();
        if !all.is_empty() {
            all.push(',');
        }
        all.push_str(value);
    }
    joined
}

fn stories(said: &[Said]) -> String {
    let of_proxy = |(proxy, said): &Said| {
        let records = said["records"].as_array().into_iter().flatten();
        records.map(|record| format!("{proxy} ({}): {}", word(&record["side"]), text(record))).collect::<String>()
    };
    said.iter().map(of_proxy).collect::<Vec<_>>().join("\n")
}

fn list(said: &[Said]) -> String {
    let mut out = String::new();
    for (proxy, said) in said {
        for one in said["requests"].as_array().into_iter().flatten() {
            let fields = ["request_id", "at", "side", "method", "path", "destination", "status", "flags", "ended_by"];
            let line: Vec<String> = fields.iter().map(|name| word(&one[*name])).collect();
            let _ = writeln!(out, "{proxy}  {}", line.join("  "));
        }
    }
    out
}

fn decisions(said: &[Said]) -> String {
    let mut out = String::new();
    for (proxy, said) in said {
        let decided = &said["decided"];
        let _ = write!(out, "{proxy}: to {}, ", word(&said["to"]));
        match (decided["destination"].as_str(), decided["rule"].as_object()) {
            (None, _) => out.push_str("no part of the mesh\n"),
            (Some(name), None) => drop(writeln!(out, "{name}")),
            (Some(name), Some(rule)) if word(&rule["name"]).ends_with(NO_RULE) => {
                let _ = writeln!(out, "{name}, no rule takes it ({})", word(&rule["place"]));
            }
            (Some(name), Some(rule)) => {
                let _ = writeln!(out, "{name}, rule {} ({})", word(&rule["name"]), word(&rule["place"]));
                let _ = writeln!(out, "  policy     {}", rule["policy"]);
            }
        }
        if decided["backends"].as_array().is_some_and(Vec::is_empty) {
            out.push_str("  backend    none: it is answered by the proxy\n");
        }
        for backend in decided["backends"].as_array().into_iter().flatten() {
            let _ = writeln!(out, "  backend    {} gets {} %", word(&backend["backend"]), backend["percent"]);
            if backend["policy"].as_object().is_some_and(|policy| !policy.is_empty()) {
                let _ = writeln!(out, "  policy     {}", backend["policy"]);
            }
            for one in backend["candidates"]["endpoints"].as_array().into_iter().flatten() {
                let (endpoint, state) = (word(&one["endpoint"]), word(&one["state"]));
                let _ = writeln!(out, "  candidate  {endpoint} {state} score {}", word(&one["score"]));
            }
        }
    }
    out
}

fn word(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_string(),
        other => other.to_string(),
    }
}

fn header(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').ok_or_else(|| format!("`{text}` is no header: write NAME=VALUE"))?;
    Ok((pair.0.to_string(), pair.1.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_that_is_there_twice_has_both_values() {
        let of = |name: &str, value: &str| (name.to_string(), value.to_string());
        let joined = joined(&[of("X-A", "1"), of("x-b", "2"), of("x-a", "3")]);
        assert_eq!(joined, BTreeMap::from([of("x-a", "1,3"), of("x-b", "2")]));
    }

    #[test]
    fn no_rule_is_said_only_where_there_is_a_route() {
        let said =
            |rule: Value| json!({ "to": "web:80", "decided": { "destination": "web.default:80", "rule": rule } });
        let text = |rule: Value| decisions(&[("p".to_string(), said(rule))]);
        assert_eq!(text(Value::Null), "p: to web:80, web.default:80\n");
        let none = json!({ "name": "default/r#no-rule", "place": "a.yaml:7" });
        assert_eq!(text(none), "p: to web:80, web.default:80, no rule takes it (a.yaml:7)\n");
    }

    #[test]
    fn nothing_that_a_stranger_sent_moves_the_cursor_or_turns_the_line_round() {
        let said = json!({ "path": "/\u{9b}2J\u{202e}\u{1b}[1m\u{200b}/ä/x" });
        let list = list(&[("web".into(), json!({ "requests": [said.clone()] }))]);
        assert!(plain(&list).contains("/\\u009b2J\\u202e\\u001b[1m\\u200b/ä/x"), "{}", plain(&list));
        assert!(plain(&list).ends_with('\n'));
        let same: Value = serde_json::from_str(&plain(&said.to_string())).unwrap();
        assert_eq!(same, said, "JSON says the same still");
    }
}
