//! Who this proxy is: a first certificate, and one after the other from then on.
//!
//! The first is asked for with a join token, or the bearer token of a platform; the key is made once and kept for every
//! further attempt, because a token is spent by the first public key and an answer may be lost. Each renewal has a fresh key and is proven by
//! the certificate before. What is in force goes into an [`IdentityStore`], and stays there until something better is:
//! a renewal that fails costs nothing until the certificate truly expires.

mod ask;
mod kept;
mod schedule;
mod token;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use sheetbend_certs::{
    Alarm, DEFAULT_TTL, Identity, IdentityStore, KeyAndCsr, Material, RENEWAL_GRACE, Sha256, TrustBundle, format_span,
    format_time,
};
use tokio::sync::watch;

use self::ask::{Answer, AskError, ask};
use self::kept::Kept;
use self::schedule::Loudness;
use crate::backoff;
use crate::channel::{ConnectError, Connector, same_roots};

pub use token::{JoinToken, TokenError};

/// What a first certificate is asked for with.
#[derive(Clone, Debug)]
pub enum Proof {
    /// A join token, which also names the root to trust.
    Join(JoinToken),
    /// A file with a bearer token, read anew at each attempt because platforms replace it, and the bundle to trust.
    BearerFile(PathBuf, Arc<TrustBundle>),
    /// Nothing: what is kept on disk has to do.
    Kept,
}

/// What identity needs to know.
#[derive(Clone, Debug)]
pub struct IdentityConfig {
    /// `https://HOST:PORT`.
    pub control_plane: String,
    /// For the first certificate.
    pub proof: Proof,
    /// Where to keep the identity over restarts (mode 0600). `None`: in memory alone.
    pub directory: Option<PathBuf>,
    /// The lifetime to ask for. The control plane may give less.
    pub ttl: Duration,
}

impl IdentityConfig {
    /// With the usual lifetime of 24 h, kept in memory.
    pub fn new(control_plane: impl Into<String>, proof: Proof) -> Self {
        Self { control_plane: control_plane.into(), proof, directory: None, ttl: DEFAULT_TTL }
    }
}

/// How things stand.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Certificates that came into force since the start.
    pub issued: u64,
    /// Attempts in a row that failed.
    pub failures: u32,
    /// Attempts that failed since the start.
    pub failed: u64,
    /// Why the last one failed; `None` after one that worked.
    pub last_error: Option<Arc<str>>,
    /// Whether asking again the same way cannot help.
    pub refused: bool,
    /// When the next renewal is due.
    pub renewal_due: Option<Instant>,
    /// How far the control plane's clock is ahead of ours, in seconds.
    pub clock_ahead: Option<i64>,
}

/// There is no certificate, and asking again will not give one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoIdentity {
    /// The control plane said no, or what was kept or given is of no use.
    #[error("{0}")]
    Refused(String),
    /// Nobody answered in the time given.
    #[error("no certificate yet: {0}")]
    Away(String),
}

/// A handle to the identity task.
#[derive(Clone)]
pub struct IdentityClient {
    store: Arc<IdentityStore>,
    status: watch::Receiver<Status>,
}

impl IdentityClient {
    /// Starts: a handle, and a task to spawn that fills `store` and keeps it fresh for as long as it is polled.
    pub fn start(
        config: IdentityConfig,
        store: Arc<IdentityStore>,
    ) -> Result<(Self, impl Future<Output = ()> + Send + 'static), ConnectError> {
        // A bad URL is told at once, not at the first attempt.
        Connector::first_trust(&config.control_plane, Sha256([0; 32]))?;
        let (status, watched) = watch::channel(Status::default());
        let kept = config.directory.as_deref().map(Kept::in_directory);
        let task = Task { config, store: store.clone(), status, kept };
        Ok((Self { store, status: watched }, task.run()))
    }

    /// Waits for the first certificate, until it is clear that there will be none, or for `patience`.
    pub async fn first(&self, patience: Duration) -> Result<Arc<Material>, NoIdentity> {
        let mut material = self.store.subscribe();
        let mut status = self.status.clone();
        let reason = |status: &Status| status.last_error.as_deref().unwrap_or("no attempt has ended").to_string();
        let found = async {
            // In order: a certificate in force outweighs whatever the attempt before it said.
            tokio::select! {
                biased;
                Ok(found) = material.wait_for(Option::is_some) => found.clone().ok_or_else(|| "gone".to_string()),
                Ok(status) = status.wait_for(|status| status.refused) => Err(reason(&status)),
                else => Err("the identity task has ended".to_string()),
            }
        };
        match tokio::time::timeout(patience, found).await {
            Ok(found) => found.map_err(NoIdentity::Refused),
            Err(_) => Err(NoIdentity::Away(reason(&self.status.borrow()))),
        }
    }

    /// How things stand, and every change of that.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }
}

struct Task {
    config: IdentityConfig,
    store: Arc<IdentityStore>,
    status: watch::Sender<Status>,
    kept: Option<Kept>,
}

impl Task {
    async fn run(self) {
        let mut current = match self.load() {
            Some(kept) => kept,
            None => match self.first().await {
                Some(first) => first,
                None => return,
            },
        };
        loop {
            self.wait_until_due(&current).await;
            current = self.renew(&current).await;
        }
    }

    /// What was kept, put in force. One that has expired is not, but it still proves who may renew it.
    fn load(&self) -> Option<(Identity, Arc<TrustBundle>)> {
        let (identity, bundle) = match self.kept.as_ref()?.load() {
            Ok(found) => found?,
            Err(reason) => {
                tracing::warn!(reason, "the identity that was kept is of no use");
                return None;
            }
        };
        if let Some(reason) = self.outdated(&identity, &bundle) {
            tracing::info!(id = %identity.id, reason, "the identity that was kept is left aside");
            return None;
        }
        match self.store.install(identity.clone(), bundle.clone(), SystemTime::now()) {
            Ok(_) => {
                let until = format_time(identity.not_after);
                tracing::info!(id = %identity.id, until, "took up the identity that was kept");
            }
            Err(reason) => {
                tracing::warn!(id = %identity.id, %reason, "the identity that was kept must be renewed first")
            }
        }
        Some((identity, bundle))
    }

    /// Why a join token that was given outweighs what was kept, if it does.
    fn outdated(&self, identity: &Identity, bundle: &TrustBundle) -> Option<&'static str> {
        let Proof::Join(token) = &self.config.proof else { return None };
        if identity.id != token.id {
            return Some("the join token is for another");
        }
        if !bundle.contains(token.root) {
            return Some("the join token names a root that it does not know");
        }
        let over = SystemTime::now().duration_since(identity.not_after).ok()?;
        (over > RENEWAL_GRACE).then_some("it expired too long ago to be renewed")
    }

    /// Asks until there is an answer. `None`: asking makes no sense.
    async fn first(&self) -> Option<(Identity, Arc<TrustBundle>)> {
        let key = match KeyAndCsr::generate() {
            Ok(key) => key,
            Err(error) => {
                self.failed(&AskError::Refused(format!("no key can be made: {error}")), None);
                return None;
            }
        };
        if matches!(self.config.proof, Proof::Kept) {
            let reason = "there is no identity on disk, and no token to ask for one".to_string();
            self.failed(&AskError::Refused(reason), None);
            return None;
        }
        loop {
            let outcome = match self.ask_first(&key).await {
                Ok(answer) => self.take(answer, None),
                Err(error) => Err(error),
            };
            match outcome {
                Ok(taken) => return Some(taken),
                Err(error) => {
                    // A refusal is tried again too: a token file may be replaced, a clock put right.
                    tokio::time::sleep(self.failed(&error, None)).await;
                }
            }
        }
    }

    async fn ask_first(&self, key: &KeyAndCsr) -> Result<Answer, AskError> {
        let url = &self.config.control_plane;
        let away = |error: ConnectError| AskError::Away(error.to_string());
        match &self.config.proof {
            Proof::Join(token) => {
                let connector = Connector::first_trust(url, token.root).map_err(away)?;
                let answer = ask(&connector, Some(token.as_str()), key, self.config.ttl).await?;
                if !answer.bundle.contains(token.root) {
                    // Whoever has the pinned root's key may say anything, except that it is somebody else's mesh.
                    return Err(AskError::Refused("the trust bundle lacks the root that the token names".to_string()));
                }
                if answer.identity.id != token.id {
                    let (found, wanted) = (&answer.identity.id, &token.id);
                    return Err(AskError::Refused(format!("the certificate is for {found}, the token for {wanted}")));
                }
                Ok(answer)
            }
            Proof::BearerFile(path, bundle) => {
                let token = std::fs::read_to_string(path);
                let token = token.map_err(|error| AskError::Away(format!("{}: {error}", path.display())))?;
                let connector = Connector::known_bundle(url, bundle.clone()).map_err(away)?;
                ask(&connector, Some(token.trim()), key, self.config.ttl).await
            }
            Proof::Kept => Err(AskError::Refused("there is nothing to ask with".to_string())),
        }
    }

    /// Two thirds of the life, or soon after the bundle changed.
    async fn wait_until_due(&self, (identity, bundle): &(Identity, Arc<TrustBundle>)) {
        let now = SystemTime::now();
        let wait = schedule::until_renewal(identity.not_before, identity.not_after, now, rand::random());
        self.status.send_modify(|status| status.renewal_due = Some(Instant::now() + wait));
        let mut material = self.store.subscribe();
        let another = |found: &Option<Arc<Material>>| found.as_ref().is_some_and(|m| !same_roots(&m.bundle, bundle));
        let rotated = async {
            if material.wait_for(another).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        // In no order: whichever comes first.
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = rotated => tokio::time::sleep(schedule::after_rotation(rand::random())).await,
        }
    }

    /// Asks until there is an answer. The one in force stays meanwhile.
    async fn renew(&self, (identity, bundle): &(Identity, Arc<TrustBundle>)) -> (Identity, Arc<TrustBundle>) {
        loop {
            // A bundle told over the discovery stream is newer than the one that came with the certificate.
            let bundle = self.store.current().map_or_else(|| bundle.clone(), |material| material.bundle.clone());
            let error = match self.ask_again(identity, bundle.clone()).await {
                Ok(answer) => match self.take(answer, Some(&bundle)) {
                    Ok(taken) => return taken,
                    Err(error) => error,
                },
                Err(error) => error,
            };
            tokio::time::sleep(self.failed(&error, Some(identity))).await;
        }
    }

    async fn ask_again(&self, identity: &Identity, bundle: Arc<TrustBundle>) -> Result<Answer, AskError> {
        let away = |error: &dyn std::fmt::Display| AskError::Away(error.to_string());
        let key = KeyAndCsr::generate().map_err(|error| away(&error))?;
        let connector =
            Connector::renewal(&self.config.control_plane, identity, bundle).map_err(|error| away(&error))?;
        let answer = ask(&connector, None, &key, self.config.ttl).await?;
        match answer.identity.id == identity.id {
            true => Ok(answer),
            false => Err(AskError::Refused(format!("the new certificate is for {}", answer.identity.id))),
        }
    }

    /// Puts an answer in force, and keeps it. `asked_with` is the bundle that was in force when it was asked for: where
    /// another is by now, it was told over the discovery stream and is newer than the one in the answer.
    fn take(&self, answer: Answer, asked_with: Option<&TrustBundle>) -> Result<(Identity, Arc<TrustBundle>), AskError> {
        let Answer { identity, bundle, clock_ahead } = answer;
        let installed = self.store.update(SystemTime::now(), |current| {
            let told = current.filter(|current| asked_with.is_some_and(|asked| !same_roots(asked, &current.bundle)));
            (identity.clone(), told.map_or_else(|| bundle.clone(), |current| current.bundle.clone()))
        });
        let off = clock_ahead.map(clock).unwrap_or_default();
        let material = installed.map_err(|error| AskError::Away(format!("{error}{off}")))?;
        if clock_ahead.is_some_and(|ahead| ahead.abs() > 30) {
            tracing::warn!("certificates hold by the clock{off}");
        }
        tracing::info!(id = %identity.id, until = format_time(identity.not_after), "a certificate is in force");
        if let Some(kept) = &self.kept
            && let Err(error) = kept.save(&identity, &material.bundle)
        {
            tracing::warn!(%error, "the identity cannot be kept; a restart will need a token");
        }
        self.status.send_modify(|status| {
            *status = Status { issued: status.issued + 1, clock_ahead, ..Status::default() };
        });
        // The answer's own: if another one is in force, it is a reason to renew again.
        Ok((identity, bundle))
    }

    /// Says it as loudly as it matters, and how long to wait now.
    fn failed(&self, error: &AskError, identity: Option<&Identity>) -> Duration {
        let mut failures = 0;
        let nothing_in_force = self.store.current().is_none();
        self.status.send_modify(|status| {
            status.failures = status.failures.saturating_add(1);
            status.failed += 1;
            status.last_error = Some(error.to_string().into());
            status.refused = nothing_in_force && matches!(error, AskError::Refused(_));
            failures = status.failures;
        });
        let wait = backoff::wait(failures, rand::random());
        let Some(identity) = identity else {
            if failures.is_power_of_two() {
                tracing::warn!(%error, failures, "no certificate yet");
            }
            return wait;
        };
        let now = SystemTime::now();
        let left = identity.not_after.duration_since(now).ok();
        let time = match left {
            Some(left) => format!("it holds for {} more", format_span(left)),
            None => format!("it expired at {}", format_time(identity.not_after)),
        };
        match schedule::loudness(failures, Alarm::at(identity.not_before, identity.not_after, now)) {
            Loudness::Quiet => {}
            Loudness::Warn => tracing::warn!(%error, failures, "the certificate is not renewed yet; {time}"),
            Loudness::Error => tracing::error!(%error, failures, "THE CERTIFICATE IS NOT RENEWED; {time}"),
        }
        wait
    }
}

/// What is wrong with our clock, in words.
fn clock(ahead: i64) -> String {
    let by = format_span(Duration::from_secs(ahead.unsigned_abs()));
    match ahead {
        0 => String::new(),
        1.. => format!("; this machine's clock is {by} behind the control plane's"),
        _ => format!("; this machine's clock is {by} ahead of the control plane's"),
    }
}
