//! `sheetbend breakers eject` and `restore`: an operator's word, said to each proxy that uses the endpoint.

use std::path::PathBuf;

use serde_json::Value;
use sheetbend_control_plane_client::admin_http::{self, AskError};

use super::{failure, proxies};
use crate::Failure;

#[derive(clap::Subcommand)]
pub(crate) enum Act {
    /// Leave an endpoint alone for a while, as far as enough others are left
    Eject(Eject),
    /// Use an endpoint again, whatever speaks against it
    Restore(Restore),
}

#[derive(clap::Args)]
pub(crate) struct Eject {
    /// For how long: 30s, 1h30m; 24h at most. Then it is tried, as after any ejection
    #[arg(long = "for", value_name = "TIME", default_value = "5m", value_parser = time)]
    time: String,

    #[command(flatten)]
    whom: Whom,
}

#[derive(clap::Args)]
pub(crate) struct Restore {
    /// Do not eject it again for so long, whatever comes of its requests; 24h at most
    #[arg(long = "for", value_name = "TIME", default_value = "0s", value_parser = time)]
    time: String,

    #[command(flatten)]
    whom: Whom,
}

#[derive(clap::Args)]
struct Whom {
    /// The endpoint, as `sheetbend breakers` shows it: 127.0.0.1:4000
    #[arg(value_name = "ENDPOINT")]
    endpoint: String,

    /// The backend, where the endpoint belongs to several: web.default:80
    #[arg(long, value_name = "NAME")]
    backend: Option<String>,

    /// Admin ports of proxies to tell: http://HOST:PORT [default: those of the sidecars that run here]
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    proxy: Vec<String>,

    /// Where `run` keeps the mesh of this user [default: $XDG_STATE_HOME/sheetbend, ~/.local/state/sheetbend]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

/// Tells every proxy that uses the endpoint. One that refuses does not keep the others from hearing of it.
pub(super) async fn tell(act: &Act) -> Result<(), Failure> {
    let (verb, time, whom) = match act {
        Act::Eject(Eject { time, whom }) => ("eject", time, whom),
        Act::Restore(Restore { time, whom }) => ("restore", time, whom),
    };
    let known = |c: char| c.is_ascii_alphanumeric() || ".:[]-_".contains(c);
    for text in [Some(&whom.endpoint), whom.backend.as_ref()].into_iter().flatten() {
        if text.is_empty() || !text.chars().all(known) {
            return Err(Failure::usage(format!(
                "`{text}` is no endpoint or backend as `sheetbend breakers` shows them"
            )));
        }
    }
    let backend = whom.backend.as_ref().map(|backend| format!("&backend={backend}")).unwrap_or_default();
    let path = format!("/breakers/{}/{verb}?ttl={time}{backend}", whom.endpoint);
    let (mut obeyed, mut unknown, mut refused) = (0, Vec::new(), Vec::new());
    for (proxy, url) in proxies(&whom.proxy, whom.state_dir.as_deref())? {
        match admin_http::post(&url, &path, "").await {
            Ok(answer) => {
                println!("{proxy}: {}", outcome(&serde_json::from_slice(&answer).unwrap_or_default()));
                obeyed += 1;
            }
            Err(AskError::Status(_, status, why)) => match status.as_u16() {
                400 => return Err(Failure::usage(why.trim())),
                404 => unknown.push(format!("{proxy}: {}", why.trim())),
                _ => refused.push(format!("{proxy}: {}", why.trim())),
            },
            Err(error) if whom.proxy.is_empty() => refused.push(format!("{proxy}: {error}")),
            Err(error) => return Err(failure(error)),
        }
    }
    match (obeyed, refused.is_empty()) {
        (_, false) => Err(Failure::new(refused.join("\n"))),
        // Who never called it has nothing to eject.
        (0, true) => Err(Failure::new(unknown.join("\n"))),
        (_, true) => Ok(()),
    }
}

fn outcome(endpoint: &Value) -> String {
    let text = |name: &str| endpoint[name].as_str().unwrap_or("?").to_string();
    let (place, backend, state) = (text("endpoint"), text("backend"), text("state"));
    let until = match (endpoint["next_probe"].as_str(), endpoint["held_until"].as_str()) {
        (Some(at), _) => format!("; it is tried again at {at}"),
        (None, Some(at)) => format!("; nothing ejects it until {at}"),
        (None, None) => String::new(),
    };
    format!("{place} of {backend} is {state}{until}")
}

fn time(text: &str) -> Result<String, String> {
    let parsed = sheetbend_control_plane_client::model::duration::parse(text);
    parsed.map(|_| text.to_string()).map_err(|error| error.to_string())
}
