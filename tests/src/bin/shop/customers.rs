//! Customers: a steady rate of requests, whatever the answers take.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::Method;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::Error;
use crate::call::Http;

#[derive(Default, Serialize)]
struct Tally {
    sent: AtomicU64,
    answered: AtomicU64,
    failed: AtomicU64,
}

pub(crate) async fn buy(rate: u32) -> Result<(), Error> {
    let (http, tally) = (Arc::new(Http::default()), Arc::new(Tally::default()));
    let mut stop = signal(SignalKind::terminate())?;
    let mut tick = interval(Duration::from_secs(1) / rate.max(1));
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut report = interval(Duration::from_millis(500));
    let mut open = JoinSet::new();
    loop {
        // No branch loses anything when another wins: ticks and signals wait.
        tokio::select! {
            _ = stop.recv() => break,
            _ = report.tick() => println!("{}", serde_json::to_string(&*tally)?),
            _ = tick.tick() => {
                open.spawn(visit(http.clone(), tally.clone()));
            }
            Some(_) = open.join_next() => {}
        }
    }
    while open.join_next().await.is_some() {}
    println!("{}", serde_json::to_string(&*tally)?);
    Ok(())
}

async fn visit(http: Arc<Http>, tally: Arc<Tally>) {
    let number = tally.sent.fetch_add(1, Ordering::Relaxed);
    let answer = match number % 5 {
        4 => http.call(Method::POST, "http://frontend/checkout", "sheet-bend").await,
        _ => http.call(Method::GET, "http://frontend/", "").await,
    };
    match answer {
        Ok((status, _)) if status.is_success() => {
            tally.answered.fetch_add(1, Ordering::Relaxed);
        }
        Ok((status, body)) => {
            tally.failed.fetch_add(1, Ordering::Relaxed);
            eprintln!("customer {number}: {status}: {}", String::from_utf8_lossy(&body).trim());
        }
        Err(error) => {
            tally.failed.fetch_add(1, Ordering::Relaxed);
            eprintln!("customer {number}: {error}");
        }
    }
}
