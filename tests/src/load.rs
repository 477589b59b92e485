//! A steady load of small requests through a sidecar, and how it fared.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use crate::http::{http1, read};

/// Clients that ask for one URL, over and over.
#[derive(Debug)]
pub struct Load {
    clients: JoinSet<()>,
    stop: Arc<AtomicBool>,
    tally: Arc<Mutex<Tally>>,
}

/// A good answer.
#[derive(Clone, Copy, Debug)]
pub struct Good {
    /// When it was asked for.
    pub asked: Instant,
    /// How long it took.
    pub took: Duration,
}

/// What became of the requests.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// The good answers.
    pub good: Vec<Good>,
    /// What went wrong with each of the others, with the time since the start.
    pub failed: Vec<(Duration, String)>,
}

impl Load {
    /// `clients` connections through the sidecar at `proxy`, each asking for `url` at `rate` requests a second.
    pub fn start(proxy: SocketAddr, url: &str, clients: u32, rate: f64) -> Self {
        let mut load = Self { clients: JoinSet::new(), stop: Arc::default(), tally: Arc::default() };
        let every = Duration::from_secs_f64(1.0 / rate);
        for number in 0..clients {
            // One after the other, not all at once and over again.
            let pace = interval_at(Instant::now() + every * number / clients, every);
            load.clients.spawn(client(proxy, url.into(), pace, load.stop.clone(), load.tally.clone()));
        }
        load
    }

    /// What became of the requests so far.
    pub fn so_far(&self) -> Tally {
        self.tally.lock().expect("no panic holds this lock").clone()
    }

    /// Lets every client finish its request, and counts.
    pub async fn stop(mut self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        while self.clients.join_next().await.is_some() {}
        self.so_far()
    }
}

impl Tally {
    /// Panics with the first failures, if there was one, or when there were fewer than `least` good answers.
    #[track_caller]
    pub fn assert_none_failed(&self, least: usize) {
        let some: Vec<_> = self.failed.iter().take(5).collect();
        assert!(some.is_empty(), "{} of {} failed: {some:#?}", self.failed.len(), self.failed.len() + self.good.len());
        assert!(self.good.len() >= least, "only {} answers", self.good.len());
    }
}

async fn client(proxy: SocketAddr, url: String, mut pace: Interval, stop: Arc<AtomicBool>, tally: Arc<Mutex<Tally>>) {
    let began = Instant::now();
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let host = url.split('/').nth(2).unwrap_or_default().to_string();
    let mut sender = None;
    while !stop.load(Ordering::Relaxed) {
        pace.tick().await;
        let asked = Instant::now();
        let call = async {
            let mut open = match sender.take() {
                Some(open) => open,
                None => http1(proxy).await?,
            };
            let request = Request::get(&url).header("host", &host).body(Full::<Bytes>::default())?;
            let answer = read(open.send_request(request).await?).await?;
            match answer.status.is_success() {
                true => {}
                false => return Err(format!("{}: {:?} {}", answer.status, answer.headers, answer.text()).into()),
            }
            if open.ready().await.is_ok() {
                sender = Some(open);
            }
            Ok::<(), crate::http::Error>(())
        };
        let outcome = tokio::time::timeout(Duration::from_secs(20), call).await;
        let mut tally = tally.lock().expect("no panic holds this lock");
        match outcome {
            Ok(Ok(())) => tally.good.push(Good { asked, took: asked.elapsed() }),
            Ok(Err(error)) => tally.failed.push((began.elapsed(), error.to_string())),
            Err(_) => tally.failed.push((began.elapsed(), "no answer within 20 s".into())),
        }
    }
}
