//! The life of a `run`, top to bottom.

use std::net::SocketAddr;
use std::process::ExitCode;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

use super::child::{Child, exit_code};
use super::plan::{AppPort, Plan};
use super::record::{Record, started};
use super::sidecar::Sidecar;
use super::signals::{self, PassOn, Received};
use super::{environment, listening};
use crate::Failure;

/// Starts sidecar and program, and gives back how the program ended.
pub(super) async fn supervise(plan: Plan) -> Result<ExitCode, Failure> {
    let listened = signals::listen().map_err(|why| Failure::new(format!("cannot listen for signals: {why}")))?;
    let mut signals = listened;
    for port in plan.ports.iter().filter(|port| listening::taken(port.local)) {
        say(&format!("port {} is served already, before the program starts; callers will reach that", port.local));
    }
    let sidecar = tokio::select! {
        sidecar = Sidecar::start(&plan) => sidecar?,
        // There is no program yet that could be told to stop.
        received = stop(&mut signals) => return Ok(ExitCode::from(status_of(received))),
    };
    let record = Record {
        pid: std::process::id(),
        started: started(std::process::id()).unwrap_or(0),
        service: format!("{}.{}", plan.service, plan.namespace),
        admin: format!("http://{}", sidecar.admin),
        outbound: sidecar.outbound.to_string(),
        control_plane: sidecar.control_plane.clone(),
    };
    // Held to the end: the file goes with it.
    let _record = record.write(&plan.state).map_err(|why| {
        Failure::new(format!("cannot write to {}: {why}; choose another place with --state-dir", plan.state.display()))
    })?;
    let host = &sidecar.control_plane_host;
    let environment = environment::environment(sidecar.outbound, host, |name| std::env::var(name).ok());
    environment.warnings.iter().for_each(|warning| say(warning));
    let mut child = Child::start(&plan.program, &plan.arguments, environment)?;
    tracing::info!(service = %record.service, outbound = %sidecar.outbound, admin = %record.admin,
        pid = child.pid().as_raw_nonzero().get(), "started the program");

    let mut opening: FuturesUnordered<_> = plan.ports.iter().map(|port| first_accept(*port)).collect();
    let mut stopping = false;
    let status = loop {
        // No branch loses anything when another is taken: ends, signals and ports are all kept by their sources.
        tokio::select! {
            status = child.wait() => break status,
            Some(received) = signals.recv() => {
                if received.ends() && !stopping {
                    stopping = true;
                    sidecar.withdraw().await;
                }
                match received.pass_on(child.group) {
                    PassOn::Nobody => {}
                    PassOn::Program => child.signal(received.signal),
                    PassOn::Group => child.signal_group(received.signal),
                }
            }
            Some((port, listeners)) = opening.next(), if !stopping => {
                if let Some(warning) = listening::warning(port.local, &listeners) {
                    say(&warning);
                }
                if let Some(app) = listening::call_at(&listeners) {
                    sidecar.register(port, app);
                }
            }
        }
    };
    let status = status.map_err(|why| Failure::new(format!("lost the program: {why}")))?;
    if !stopping {
        sidecar.withdraw().await;
    }
    sidecar.end().await;
    Ok(exit_code(status))
}

async fn first_accept(port: AppPort) -> (AppPort, Vec<SocketAddr>) {
    (port, listening::accepts(port.local).await)
}

/// Waits for a signal that ends.
async fn stop(signals: &mut tokio::sync::mpsc::UnboundedReceiver<Received>) -> Received {
    loop {
        match signals.recv().await {
            Some(received) if received.ends() => return received,
            Some(_) => {}
            None => std::future::pending().await,
        }
    }
}

fn status_of(received: Received) -> u8 {
    u8::try_from(128 + received.signal.as_raw()).unwrap_or(1)
}

/// A word to the operator, whatever the log level is.
fn say(text: &str) {
    eprintln!("sheetbend: {text}");
}
