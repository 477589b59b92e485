//! `sheetbend breakers --watch`: the breakers as they are, and then a line for each change.

use std::collections::HashSet;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};
use sheetbend_control_plane_client::admin_http::{self, Event};
use tokio::sync::mpsc;

use super::{Args, Output, Said, failure, proxies, table};
use crate::Failure;

/// How often proxies are looked for that run here, or answer again.
const LOOK: Duration = Duration::from_secs(1);

enum News {
    Told(Event),
    /// It tells no more.
    Gone,
}

/// Until Ctrl-C, or until nobody reads what is printed.
pub(super) async fn run(args: &Args) -> Result<ExitCode, Failure> {
    let (tell, mut told) = mpsc::channel::<(String, String, News)>(64);
    let mut watched = HashSet::new();
    let mut first = true;
    let mut look = tokio::time::interval(LOOK);
    loop {
        // Neither branch loses anything when the other one is taken.
        tokio::select! {
            _ = look.tick() => {
                let running = match proxies(&args.proxy, args.state_dir.as_deref()) {
                    Ok(running) => running,
                    Err(error) if first => return Err(error),
                    Err(_) => Vec::new(),
                };
                for (name, url) in running.into_iter().filter(|(_, url)| !watched.contains(url)).collect::<Vec<_>>() {
                    match admin_http::watch(&url, "/breakers?watch").await {
                        Ok(events) => {
                            watched.insert(url.clone());
                            tokio::spawn(pass_on(events, name, url, tell.clone()));
                        }
                        Err(error) if first => return Err(failure(error)),
                        Err(_) => {}
                    }
                }
                first = false;
            }
            Some((name, url, news)) = told.recv() => {
                if matches!(news, News::Gone) {
                    watched.remove(&url);
                }
                match print(&name, &news, args.output) {
                    Ok(()) => {}
                    // `| head` has seen enough.
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
                    Err(error) => return Err(Failure::new(format!("cannot write the answer: {error}"))),
                }
            }
        }
    }
}

async fn pass_on(
    mut events: admin_http::Events,
    name: String,
    url: String,
    tell: mpsc::Sender<(String, String, News)>,
) {
    while let Some(event) = events.next().await {
        if tell.send((name.clone(), url.clone(), News::Told(event))).await.is_err() {
            return;
        }
    }
    let _ = tell.send((name, url, News::Gone)).await;
}

fn print(proxy: &str, news: &News, output: Output) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match (news, output) {
        (News::Told(event), Output::Table) => write!(out, "{}", text(proxy, event))?,
        (News::Gone, Output::Table) => writeln!(out, "{proxy}: gone; it is asked again every second")?,
        (News::Told(event), Output::Json) => {
            let data: Value = serde_json::from_str(&event.data).unwrap_or_default();
            writeln!(out, "{}", json!({ "proxy": proxy, "event": event.name, "data": data }))?;
        }
        (News::Gone, Output::Json) => writeln!(out, "{}", json!({ "proxy": proxy, "event": "gone" }))?,
    }
    out.flush()
}

/// An event as somebody reads it who is on call.
fn text(proxy: &str, event: &Event) -> String {
    let data: Value = serde_json::from_str(&event.data).unwrap_or_default();
    let word = |name: &str| data[name].as_str().unwrap_or("-");
    let (at, backend, place) = (clock(word("at")), word("backend"), word("endpoint"));
    match event.name.as_str() {
        "breakers" => {
            let breakers = data["endpoints"].as_array().cloned().unwrap_or_default();
            table(&[Said { proxy: proxy.to_string(), breakers }])
        }
        "turn" => format!("{at}  {proxy}  {backend}  {place}  {}: {}\n", word("state"), why(&data)),
        "circuit" => {
            let what = match word("state") {
                "Open" => format!("everything is answered at once until {}", clock(word("next_trial"))),
                "HalfOpen" => "one request at a time tries it".to_string(),
                _ => "everything passes".to_string(),
            };
            format!("{at}  {proxy}  {backend}  circuit {}: {what}\n", word("state"))
        }
        "added" => format!("          {proxy}  {backend}  {place}  is an endpoint now\n"),
        "removed" => format!("          {proxy}  {backend}  {place}  is no endpoint any more\n"),
        // Of a later version.
        other => format!("          {proxy}  {other} {data}\n"),
    }
}

fn why(turn: &Value) -> String {
    let state = (turn["from"].as_str().unwrap_or("-"), turn["state"].as_str().unwrap_or("-"));
    let failed = format!("{} of {} requests failed lately", turn["failures"], turn["requests"]);
    match (state, turn["reason"].as_str(), turn["next_probe"].as_str()) {
        ((_, "Ejected"), Some("health_check"), _) => "health_check; until its checks pass".to_string(),
        ((_, "Ejected"), Some("operator"), Some(at)) => format!("operator; until {}", clock(at)),
        ((_, "Ejected"), Some(reason), Some(at)) => format!("{reason}; {failed}; tried again at {}", clock(at)),
        ((_, "Ejected"), _, Some(at)) => format!("whoever tried it left; tried again at {}", clock(at)),
        ((_, "Probing"), _, _) if turn["growing"] == true => "it answers; its share grows".to_string(),
        ((_, "Probing"), _, _) => "one request at a time tries it".to_string(),
        ((_, "Serving"), Some("operator"), _) => "restored by an operator".to_string(),
        (("Probing", "Serving"), _, _) => "it has its whole share again".to_string(),
        ((_, "Serving"), _, _) => "too few others are left".to_string(),
        _ => failed,
    }
}

/// `2026-01-01T12:00:01Z` is `12:00:01Z` for somebody who looks on.
fn clock(time: &str) -> &str {
    time.split_once('T').map_or(time, |(_, time)| time)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(name: &str, data: Value) -> String {
        text("caller", &Event { name: name.to_string(), data: data.to_string() })
    }

    #[test]
    fn a_change_is_a_line_that_says_when_where_what_and_why() {
        let turn = |from: &str, state: &str, growing: bool, reason: Option<&str>, next: Option<&str>| {
            told(
                "turn",
                json!({
                    "at": "2026-01-01T12:00:01Z", "backend": "web.default:80", "endpoint": "10.0.0.1:80", "from": from,
                    "state": state, "growing": growing, "reason": reason, "next_probe": next, "requests": 20, "failures": 7,
                }),
            )
        };
        let next = Some("2026-01-01T12:00:02Z");
        for (line, ends) in [
            (
                turn("Serving", "Ejected", false, Some("consecutive_failures"), next),
                "Ejected: consecutive_failures; 7 of 20 requests failed lately; tried again at 12:00:02Z\n",
            ),
            (turn("Serving", "Ejected", false, Some("operator"), next), "Ejected: operator; until 12:00:02Z\n"),
            (
                turn("Serving", "Ejected", false, Some("health_check"), None),
                "Ejected: health_check; until its checks pass\n",
            ),
            (turn("Ejected", "Probing", false, None, None), "Probing: one request at a time tries it\n"),
            (turn("Probing", "Probing", true, None, None), "Probing: it answers; its share grows\n"),
            (turn("Probing", "Serving", false, None, None), "Serving: it has its whole share again\n"),
            (turn("Ejected", "Serving", false, None, None), "Serving: too few others are left\n"),
            (turn("Ejected", "Serving", false, Some("operator"), None), "Serving: restored by an operator\n"),
        ] {
            assert_eq!(line, format!("12:00:01Z  caller  web.default:80  10.0.0.1:80  {ends}"));
        }
        let open =
            json!({"at": "2026-01-01T12:00:01Z", "backend": "web.default:80", "state": "Open", "next_trial": next});
        let expected =
            "12:00:01Z  caller  web.default:80  circuit Open: everything is answered at once until 12:00:02Z\n";
        assert_eq!(told("circuit", open), expected);
    }
}
