//! A server that is slow for as long as a story wants.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use http::{Request, Response};
use tokio::sync::watch;

use crate::{App, START, eventually, full};

/// A server that answers once it is told to (but `/healthz` at once), and knows how many wait for that.
pub struct Slow {
    /// Where it is.
    pub app: App,
    inside: Arc<AtomicU64>,
    /// How many were with it at once at most.
    pub most: Arc<AtomicU64>,
    /// Whether it answers.
    pub open: watch::Sender<bool>,
}

/// A request that is with the app until this is dropped.
struct Inside(Arc<AtomicU64>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Slow {
    /// Answers nobody yet.
    pub async fn start() -> Self {
        let (inside, most) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let open = watch::Sender::new(false);
        let (now, ever, gate) = (Arc::clone(&inside), Arc::clone(&most), open.subscribe());
        let app = App::start(move |request: Request<hyper::body::Incoming>| {
            let (now, ever, mut gate) = (Arc::clone(&now), Arc::clone(&ever), gate.clone());
            async move {
                if request.uri().path() == "/healthz" {
                    return Response::new(full("well\n"));
                }
                ever.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
                let _inside = Inside(now);
                let _ = gate.wait_for(|open| *open).await;
                Response::new(full("slow\n"))
            }
        });
        Self { app: app.await, inside, most, open }
    }

    /// Waits until so many requests are with it.
    pub async fn has(&self, requests: u64) {
        let what = format!("{requests} requests are with the app");
        eventually(&what, START, || async { (self.inside.load(SeqCst) == requests).then_some(()) }).await;
    }
}
