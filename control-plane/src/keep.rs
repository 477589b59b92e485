//! The tasks that run as long as the control plane does. Each ends when it is told to stop.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use notify::{RecursiveMode, Watcher};
use sheetbend_certs::format_time;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::listen::Door;
use crate::own::Own;
use crate::report::Reports;
use crate::resources::{GONE, Problem};
use crate::state::{Shared, Written, lock, stopped};
use crate::trust::Trust;

/// How often the CA's folder and the registrations are looked at. A silent proxy is gone within the TTL plus this.
const LOOK: Duration = Duration::from_millis(250);
/// How often the graph lets go of what nobody reports any more.
const FORGET: Duration = Duration::from_secs(5);
/// How often a folder is read although nobody said that it changed: some file systems say nothing.
const READ_ANYWAY: Duration = Duration::from_secs(2);
/// An editor writes in several steps; the last one counts.
const SETTLED: Duration = Duration::from_millis(20);

async fn until_stopped(shared: &Shared, task: impl Future<Output = ()>) {
    let mut stopping = shared.stopping();
    tokio::select! {
        // Either ends both; what a task was in the middle of is done again at the next start.
        () = task => {}
        () = stopped(&mut stopping) => {}
    }
}

/// Turns changes into worlds.
pub(crate) async fn building(shared: Arc<Shared>) {
    until_stopped(&shared, shared.keep_building()).await;
}

/// Renews our own certificate, and tells everybody of a new bundle.
pub(crate) async fn certificates(shared: Arc<Shared>, mut own: Own, door: Arc<ArcSwap<Door>>) {
    let task = async {
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut told, mut failing) = (shared.worlds().borrow().trust.version.clone(), false);
        loop {
            look.tick().await;
            let outcome = Trust::of(&shared.ca).and_then(|trust| {
                if own.is_due(&trust.bundle, &trust.active, SystemTime::now()) {
                    own = own.renew(&shared.ca)?;
                    door.store(own.door());
                    tracing::info!(until = %format_time(own.not_after()), "renewed the control plane's own certificate");
                }
                Ok(trust)
            });
            match outcome {
                Ok(trust) => {
                    failing = false;
                    if trust.version != told {
                        told.clone_from(&trust.version);
                        tracing::info!(roots = ?trust.bundle, "telling the new trust bundle");
                        shared.set_trust(trust);
                    }
                }
                // Said once a failure; the last good certificate stays until it ends.
                Err(error) if !failing => {
                    failing = true;
                    tracing::error!(%error, until = %format_time(own.not_after()), "the CA cannot be used; its last state stays");
                }
                Err(_) => {}
            }
        }
    };
    until_stopped(&shared, task).await;
}

/// Looks for silence, and keeps on disk what a restart needs.
pub(crate) async fn registrations(shared: Arc<Shared>) {
    let task = async {
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut saved, mut failing) = (None, false);
        let mut worlds = shared.worlds();
        loop {
            tokio::select! {
                _ = look.tick() => {}
                // What proxies are told must outlive us, however soon we are killed.
                Ok(()) = worlds.changed() => {}
            }
            shared.sweep();
            let (keeper, mut last) = (shared.clone(), saved.take());
            let outcome = tokio::task::spawn_blocking(move || {
                let outcome = keeper.save(&mut last);
                (last, outcome)
            });
            let Ok((last, outcome)) = outcome.await else { continue };
            saved = last;
            match outcome {
                Ok(()) => failing = false,
                Err(error) if !failing => {
                    failing = true;
                    tracing::error!(%error, "registrations are not on disk: a restart now would forget them");
                }
                Err(_) => {}
            }
        }
    };
    until_stopped(&shared, task).await;
}

/// Lets the graph forget.
pub(crate) async fn graph(shared: Arc<Shared>, reports: Reports) {
    let task = async {
        let mut look = interval(FORGET);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            reports.forget();
        }
    };
    until_stopped(&shared, task).await;
}

/// Reads the folder of resources again whenever it changes.
pub(crate) async fn resources(shared: Arc<Shared>) {
    let Some(path) = lock(&shared.folder).as_ref().map(|folder| folder.path().to_path_buf()) else { return };
    let (hints, mut hinted) = mpsc::channel(1);
    let watcher = notify::recommended_watcher(move |_| {
        let _ = hints.try_send(());
    });
    let watching = watcher.and_then(|mut watcher| {
        watcher.watch(&path, RecursiveMode::Recursive)?;
        Ok(watcher)
    });
    if let Err(error) = &watching {
        tracing::warn!(%error, folder = %path.display(), "changes are seen within 2 s only: the folder cannot be watched");
    }
    let task = async {
        let (mut failing, mut told, mut wait) = (false, Told::default(), READ_ANYWAY);
        loop {
            // With or without a hint: some file systems give none, and a hint may be the first of several.
            if let Ok(Some(())) = timeout(wait, hinted.recv()).await {
                tokio::time::sleep(SETTLED).await;
                let _ = hinted.try_recv();
            }
            if watching.is_err() {
                tokio::time::sleep(wait).await;
            }
            let reader = shared.clone();
            match tokio::task::spawn_blocking(move || reload(&reader)).await {
                Ok(Ok(waits)) => {
                    (failing, wait) = (false, if waits { GONE } else { READ_ANYWAY });
                    told.look(&shared);
                }
                Ok(Err(error)) if !failing => {
                    failing = true;
                    tracing::error!(%error, folder = %path.display(), "cannot read the resources; what they last said stays");
                }
                Ok(Err(_)) | Err(_) => {}
            }
        }
    };
    until_stopped(&shared, task).await;
}

/// What is wrong between resources, told once. What starts together is not there at one moment: told is what was wrong
/// for two looks.
#[derive(Default)]
struct Told {
    /// The world that was looked at last, and whether it was so twice.
    world: Option<(u64, bool)>,
    seen: Vec<Problem>,
    told: Vec<Problem>,
}

impl Told {
    fn look(&mut self, shared: &Shared) {
        let world = shared.worlds().borrow().number;
        match self.world {
            Some((same, twice)) if same == world && twice => return,
            before => self.world = Some((world, before.is_some_and(|(same, _)| same == world))),
        }
        let problems = shared.problems();
        self.told.retain(|told| problems.contains(told));
        let stays = |problem: &&Problem| self.seen.contains(problem) && !self.told.contains(problem);
        let news: Vec<Problem> = problems.iter().filter(stays).cloned().collect();
        for problem in news {
            tracing::warn!("{problem}; the rest works");
            self.told.push(problem);
        }
        self.seen = problems;
    }
}

/// Reads what has changed, and gives whether it is worth another look soon.
fn reload(shared: &Shared) -> std::io::Result<bool> {
    let mut folder = lock(&shared.folder);
    let Some(folder) = folder.as_mut() else { return Ok(false) };
    let (changed, refusals) = folder.reload(Instant::now())?;
    for refusal in refusals {
        tracing::error!("{refusal}; what this file last said well stays in force");
    }
    if changed {
        tracing::info!(folder = %folder.path().display(), resources = folder.resources().count(), "read the resources again");
        shared.set_written(Written::of(Some(folder)));
    }
    Ok(folder.waits())
}
