//! Closed loops: each connection (or stream) sends its next request when it has its whole answer.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

pub(crate) mod handshake;
pub(crate) mod http1;
pub(crate) mod http2;
pub(crate) mod idle;

/// The service that requests name, with the port of its app: `web.default:8000`.
pub(crate) fn authority(service: &str, port: u16) -> String {
    format!("{service}.default:{port}")
}

/// What the tasks of one load share.
#[derive(Default)]
pub(crate) struct Shared {
    /// Answers had in full.
    pub(crate) done: AtomicU64,
    /// Anything else.
    pub(crate) failed: AtomicU64,
    stop: AtomicBool,
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn count(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a failure, and says the first of a load aloud.
    fn note(&self, outcome: io::Result<()>) {
        if let Err(error) = outcome
            && !self.stopped()
            && self.failed.fetch_add(1, Ordering::Relaxed) == 0
        {
            eprintln!("  load: {error}");
        }
    }
}

/// What a window of load came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Window {
    /// Answers in the window.
    pub(crate) done: u64,
    /// Failures since the load began.
    pub(crate) failed: u64,
    /// Nanoseconds of CPU that `cpu` said were used in the window.
    pub(crate) cpu: u64,
}

/// Runs `tasks` copies of a load: `warm` unmeasured, then `measured` between two readings of `cpu`.
pub(crate) async fn measure<F>(
    tasks: usize,
    warm: Duration,
    measured: Duration,
    cpu: impl Fn() -> u64,
    load: impl Fn(Arc<Shared>) -> F,
) -> Window
where
    F: Future<Output = ()> + Send + 'static,
{
    let shared = Arc::new(Shared::default());
    let running: Vec<_> = (0..tasks).map(|_| tokio::spawn(load(shared.clone()))).collect();
    tokio::time::sleep(warm).await;
    let (done, used) = (shared.done.load(Ordering::Relaxed), cpu());
    tokio::time::sleep(measured).await;
    let window = Window {
        done: shared.done.load(Ordering::Relaxed) - done,
        cpu: cpu() - used,
        failed: shared.failed.load(Ordering::Relaxed),
    };
    shared.stop.store(true, Ordering::Relaxed);
    for task in running {
        let stuck = task.abort_handle();
        if tokio::time::timeout(Duration::from_secs(2), task).await.is_err() {
            stuck.abort();
        }
    }
    window
}
