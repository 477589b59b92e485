//! Discovery: what a target stands for, asked when traffic first names it, kept up to date from then on.
//!
//! [`Discovery::start`] gives a handle and a task. The handle reads a [`Snapshot`] without waiting; only a target that
//! is not in it yet waits for the control plane, 1 s at most. The task (`driver`) owns the one incremental ADS stream;
//! what it says and makes of the answers is decided in `state`, which knows neither sockets nor clocks.
//!
//! When the control plane is away, everything known stays in force for as long as it takes.

mod assemble;
mod driver;
mod link;
#[cfg(test)]
mod simulation;
mod snapshot;
mod state;
mod store;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, oneshot, watch};

use crate::channel::Connector;
use crate::model::{Resolution, Target};
use crate::registration::Registration;

pub use snapshot::Snapshot;

/// How long a first request waits for the answer.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// Targets known at once.
pub const MAX_TARGETS: usize = 4_096;

/// What discovery needs to know.
pub struct DiscoveryConfig {
    /// How the control plane is reached.
    pub connector: Connector,
    /// Who this proxy is, beside what its certificate says.
    pub node: NodeInfo,
    /// What this proxy serves; each change is sent at once. `None`: nothing yet.
    pub registration: watch::Receiver<Option<Registration>>,
}

/// What a proxy says of itself.
#[derive(Clone, Debug, Default)]
pub struct NodeInfo {
    /// Unique among the living: a pod's name, a run's id. It becomes the workload's name in logs.
    pub id: String,
    /// The service's name.
    pub cluster: String,
}

/// A handle to discovery. Clones share everything.
#[derive(Clone)]
pub struct Discovery {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
}

struct Shared {
    snapshot: ArcSwap<Snapshot>,
    /// Those that were in its place, for as long as somebody still reads them, and the last one a little longer: nobody
    /// who reads is to be the last who holds one, and to take it apart.
    replaced: Mutex<Vec<Arc<Snapshot>>>,
    changes: watch::Sender<Arc<Snapshot>>,
    status: watch::Sender<Status>,
}

impl Default for Shared {
    /// Nothing is known.
    fn default() -> Self {
        let empty = Arc::new(Snapshot::default());
        let status =
            Status { connected: false, since: Instant::now(), streams: 0, failures: 0, refused: 0, last_error: None };
        Self {
            snapshot: ArcSwap::new(empty.clone()),
            replaced: Mutex::default(),
            changes: watch::Sender::new(empty),
            status: watch::Sender::new(status),
        }
    }
}

impl Shared {
    fn publish(&self, mut snapshot: Snapshot) {
        snapshot.follows(&self.snapshot.load());
        let snapshot = Arc::new(snapshot);
        let replaced = self.snapshot.swap(snapshot.clone());
        self.changes.send_replace(snapshot);
        self.let_go();
        self.replaced.lock().unwrap_or_else(PoisonError::into_inner).push(replaced);
    }

    /// Takes apart what nobody reads any more.
    fn let_go(&self) {
        self.replaced.lock().unwrap_or_else(PoisonError::into_inner).retain(|one| Arc::strong_count(one) > 1);
    }
}

enum Command {
    Resolve { target: Target, answer: oneshot::Sender<Result<Resolution, Unresolved>> },
    Withdraw { done: oneshot::Sender<()> },
}

/// No answer about a target. Not "no part of the mesh", which is an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unresolved {
    /// The control plane is away or slow.
    #[error("the control plane did not answer within {} s", PATIENCE.as_secs())]
    NoAnswer,
    /// Too many targets are in use already.
    #[error("{MAX_TARGETS} destinations are in use already")]
    TooMany,
}

/// How discovery stands with its control plane.
#[derive(Clone, Debug)]
pub struct Status {
    /// Whether the stream is up and has answered.
    pub connected: bool,
    /// Since when that is so.
    pub since: Instant,
    /// Streams that came up since the start.
    pub streams: u64,
    /// Attempts and streams that ended otherwise than by a rotation of ours.
    pub failures: u64,
    /// Answers that were refused because something in them was not valid.
    pub refused: u64,
    /// Why the last stream ended, or what the last refusal said.
    pub last_error: Option<Arc<str>>,
}

impl Discovery {
    /// Starts discovery: a handle, and a task to spawn. The task ends when the last handle is dropped.
    ///
    /// Whoever keeps no handle keeps no discovery.
    pub fn start(config: DiscoveryConfig) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let shared = Arc::new(Shared::default());
        // Whoever asks waits here when the task is behind, and gives up after PATIENCE.
        let (commands, received) = mpsc::channel(256);
        (Self { shared: shared.clone(), commands }, driver::run(config, shared, received))
    }

    /// Discovery without a control plane, for measurements: it knows what it is told, all at once, and asks nobody.
    pub fn told() -> (Self, impl Fn(Vec<(Target, Resolution)>) + Send + 'static) {
        let shared = Arc::new(Shared::default());
        let tell = {
            let shared = shared.clone();
            move |all: Vec<(Target, Resolution)>| shared.publish(Snapshot::of(all))
        };
        (Self { shared, commands: mpsc::channel(1).0 }, tell)
    }

    /// What a target stands for, if that is known. Waits for nothing.
    pub fn lookup(&self, target: &Target) -> Option<Resolution> {
        self.shared.snapshot.load().get(target).cloned()
    }

    /// What a target stands for. Asks the control plane if that is not known, and waits for [`PATIENCE`] at most.
    pub async fn resolve(&self, target: &Target) -> Result<Resolution, Unresolved> {
        if let Some(known) = self.lookup(target) {
            return Ok(known);
        }
        let (answer, answered) = oneshot::channel();
        let asked = async {
            self.commands.send(Command::Resolve { target: target.clone(), answer }).await.ok()?;
            answered.await.ok()
        };
        tokio::time::timeout(PATIENCE, asked).await.ok().flatten().unwrap_or(Err(Unresolved::NoAnswer))
    }

    /// What is known now. No lock is taken; do not hold it across an `.await`.
    pub fn snapshot(&self) -> arc_swap::Guard<Arc<Snapshot>> {
        self.shared.snapshot.load()
    }

    /// Tells of every change; holds what is known.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.shared.changes.subscribe()
    }

    /// Waits until the control plane has said what the mesh is, its names and address ranges, and who may call. Before that,
    /// a name of the mesh cannot be told from a stranger's, nor a caller who may call from one who may not.
    pub async fn mesh_known(&self) {
        // An error means that the task is gone; nothing will be said any more, and whoever waits has a deadline.
        if self
            .subscribe()
            .wait_for(|snapshot| snapshot.mesh().is_some() && snapshot.inbound().is_some())
            .await
            .is_err()
        {
            std::future::pending().await
        }
    }

    /// How things stand with the control plane, and every change of that.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.shared.status.subscribe()
    }

    /// Tells the control plane that this proxy takes no more traffic, and waits until it has read that, 1 s at most.
    /// From then on changes of the registration are no longer sent. Outbound goes on.
    pub async fn withdraw(&self) {
        let (done, read) = oneshot::channel();
        let told = async {
            self.commands.send(Command::Withdraw { done }).await.ok()?;
            read.await.ok()
        };
        // Away or slow: its own TTL does the rest.
        let _ = tokio::time::timeout(PATIENCE, told).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_taken_apart_by_who_replaces_it_however_long_somebody_reads_it() {
        let (discovery, tell) = Discovery::told();
        tell(Vec::new());
        let read = discovery.snapshot();
        let old = Arc::downgrade(&read);
        tell(Vec::new());
        tell(Vec::new());
        drop(read);
        assert!(old.strong_count() > 0, "by who read it last");
        tell(Vec::new());
        assert_eq!(old.strong_count(), 0, "kept for ever");
    }
}
