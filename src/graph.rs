//! `sheetbend graph`: who calls whom.
//!
//! Without `--proxy` it looks for what runs here: a control plane (its graph is the whole mesh's), otherwise the
//! sidecars one by one, whose graphs are put together.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use sheetbend_control_plane_client::admin_http::{self, AskError};
use sheetbend_control_plane_client::graph::{self, Graph};

use crate::Failure;
use crate::run::record;

/// The control plane's admin when nobody chose another port.
const DEFAULT_ADMIN: &str = "http://127.0.0.1:15110";
/// How wide a table is when it goes to no terminal.
const WIDTH_OF_A_FILE: usize = 160;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Admin ports to ask: http://HOST:PORT of proxies, or of a control plane [default: what runs here]
    #[arg(long, value_name = "URL", num_args = 1.., value_delimiter = ',')]
    proxy: Vec<String>,

    /// The form of the answer
    #[arg(short, long, value_name = "FORM", default_value = "table")]
    output: Output,

    /// Ask again every second, until Ctrl-C
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
    Dot,
    Mermaid,
}

pub(crate) fn run(args: Args) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    loop {
        let graph = runtime.block_on(ask(&args))?;
        match print(&graph, args.output, args.watch) {
            Ok(()) => {}
            // `| head` has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
            Err(error) => return Err(Failure::new(format!("cannot write the graph: {error}"))),
        }
        if !args.watch {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn print(graph: &Graph, output: Output, again: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if again && out.is_terminal() {
        // Home, then clear what is below: no flicker.
        write!(out, "\x1b[H\x1b[J")?;
    }
    match output {
        Output::Table => write!(out, "{}", graph::table(graph, width()))?,
        Output::Json => writeln!(out, "{}", graph::json(graph))?,
        Output::Dot => write!(out, "{}", graph::dot(graph))?,
        Output::Mermaid => write!(out, "{}", graph::mermaid(graph))?,
    }
    out.flush()
}

/// The terminal's width.
pub(crate) fn width() -> usize {
    let measured = rustix::termios::tcgetwinsize(io::stdout()).map(|size| usize::from(size.ws_col)).unwrap_or(0);
    let told = || std::env::var("COLUMNS").ok()?.parse().ok();
    match measured {
        0 => told().unwrap_or(WIDTH_OF_A_FILE),
        columns => columns,
    }
}

async fn ask(args: &Args) -> Result<Graph, Failure> {
    if !args.proxy.is_empty() {
        let mut graphs = Vec::new();
        for url in &args.proxy {
            graphs.push(graph_of(url).await.map_err(|error| match error {
                Wrong::Asked(AskError::Url(_)) => Failure::usage(format!("--proxy: {error}")),
                _ => Failure::new(error),
            })?);
        }
        return Ok(Graph::union(graphs));
    }
    let state = args.state_dir.clone().or_else(crate::run::default_state_dir);
    found(state.as_deref()).await
}

/// What runs here: a control plane first, then sidecars.
async fn found(state: Option<&Path>) -> Result<Graph, Failure> {
    let mut tried = Vec::new();
    for url in state.map(control_planes).unwrap_or_default().into_iter().chain([DEFAULT_ADMIN.to_string()]) {
        match graph_of(&url).await {
            Ok(graph) => return Ok(graph),
            Err(error) => tried.push(error.to_string()),
        }
    }
    let mut graphs = Vec::new();
    for proxy in state.map(record::running).unwrap_or_default() {
        match graph_of(&proxy.admin).await {
            Ok(graph) => graphs.push(graph),
            Err(error) => tried.push(format!("{}: {error}", proxy.service)),
        }
    }
    if !graphs.is_empty() {
        return Ok(Graph::union(graphs));
    }
    let place = state.map_or("no state folder".to_string(), |dir| dir.display().to_string());
    let tried: String = tried.iter().map(|tried| format!("\n  {tried}")).collect();
    Err(Failure::new(format!(
        "nothing of a mesh runs here (looked in {place}){tried}\n\
         start one with `sheetbend run`, or name an admin port: --proxy http://127.0.0.1:PORT"
    )))
}

/// Admin ports that control planes of this state folder have written down.
fn control_planes(state: &Path) -> Vec<String> {
    [state.join("ca/control-plane.json"), state.join("control-plane.json")]
        .iter()
        .filter_map(|path| std::fs::read(path).ok())
        .filter_map(|text| serde_json::from_slice::<serde_json::Value>(&text).ok())
        .filter_map(|value| Some(value.get("admin")?.as_str()?.to_string()))
        .collect()
}

#[derive(Debug, thiserror::Error)]
enum Wrong {
    #[error(transparent)]
    Asked(#[from] AskError),
    #[error("{0} answers, but not with a service graph: {1}")]
    Answer(String, serde_json::Error),
}

async fn graph_of(url: &str) -> Result<Graph, Wrong> {
    let body = admin_http::get(url, "/graph?format=json").await?;
    serde_json::from_slice(&body).map_err(|error| Wrong::Answer(url.to_string(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_plane_that_wrote_itself_down_is_found() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(control_planes(state.path()), Vec::<String>::new());
        std::fs::create_dir(state.path().join("ca")).unwrap();
        std::fs::write(state.path().join("ca/control-plane.json"), r#"{"admin":"http://127.0.0.1:9"}"#).unwrap();
        std::fs::write(state.path().join("control-plane.json"), "not json").unwrap();
        assert_eq!(control_planes(state.path()), ["http://127.0.0.1:9"]);
    }

    #[tokio::test]
    async fn a_wrong_address_is_a_wrong_use_and_an_absent_proxy_a_failure() {
        let asked =
            |proxy: &str| Args { proxy: vec![proxy.into()], output: Output::Json, watch: false, state_dir: None };
        let wrong = ask(&asked("web")).await.unwrap_err();
        assert!(wrong.to_string().contains("write http://HOST:PORT"), "{wrong}");
        // Held, so that it becomes nobody else's meanwhile.
        let held = tokio::net::TcpSocket::new_v4().unwrap();
        held.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let absent = ask(&asked(&format!("http://{}", held.local_addr().unwrap()))).await.unwrap_err();
        assert!(absent.to_string().starts_with("cannot reach 127.0.0.1"), "{absent}");
    }
}
