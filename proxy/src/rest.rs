//! What a connection rests on, and its end once that is no longer believed.
//!
//! A connection outlives the certificates it was made with, but not the root: when that is dropped from the trust
//! bundle, the connection takes nothing new, what has been begun is finished, and then it ends. So it does when this
//! proxy's own certificate ends without a successor.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use sheetbend_certs::{IdentityStore, Material, Sha256};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::tcp::{Abort, Transferred, splice};

/// How long what has been begun may take after the root was dropped: a root may be dropped because its key was stolen.
pub const LAST: Duration = Duration::from_secs(10 * 60);
/// How long a tunnel whose server has had the last word must be silent to be between two questions.
const SILENCE: Duration = Duration::from_secs(2);

/// The root to which a peer's certificate led when the connection was made.
#[derive(Clone, Debug)]
pub struct Rest {
    root: Sha256,
    changes: watch::Receiver<Option<Arc<Material>>>,
}

impl Rest {
    /// A connection to a peer whose chain ended at `root`.
    pub fn on(root: Sha256, identity: &IdentityStore) -> Self {
        Self { root, changes: identity.subscribe() }
    }

    /// The root.
    pub fn root(&self) -> Sha256 {
        self.root
    }

    /// Returns once the root is no longer believed, or our own certificate has ended without a successor.
    pub async fn dropped(mut self) {
        let root = self.root;
        let holds = |material: &Material| material.bundle.contains(root) && !material.is_over(SystemTime::now());
        let dropped = |material: &Option<Arc<Material>>| material.as_ref().is_some_and(|material| !holds(material));
        if self.changes.wait_for(dropped).await.is_err() {
            // The store is gone, and with it the proxy.
            pending().await
        }
    }

    /// Returns once the root is no longer believed and [`LAST`] has passed since.
    pub async fn over(self) {
        self.dropped().await;
        sleep(LAST).await;
    }
}

/// [`Rest::dropped`] of a connection that may rest on nothing: then never.
async fn dropped(rest: Option<Rest>) {
    match rest {
        Some(rest) => rest.dropped().await,
        None => pending().await,
    }
}

/// Why bytes are carried no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// The two have ended.
    Ended,
    /// What one of them rests on is no longer believed.
    Rest,
    /// Nothing moved for too long.
    Idle,
}

/// [`splice`], for as long as what one of the two rests on is believed, and something moves in every `idle`. Then both are
/// closed in order.
pub async fn splice_for<A, B>(
    client: &mut A,
    server: &mut B,
    rest: Option<Rest>,
    idle: Option<Duration>,
    progress: impl Fn(Transferred),
) -> Over
where
    A: AsyncRead + AsyncWrite + Abort + Unpin,
    B: AsyncRead + AsyncWrite + Abort + Unpin,
{
    /// For the last bytes, to peers that may not read.
    const GOODBYE: Duration = Duration::from_secs(1);
    let tunnel = Tunnel::default();
    let moved = |bytes| {
        tunnel.moved(bytes);
        progress(bytes);
    };
    let over = tokio::select! {
        // Bytes first: what can still be carried is.
        biased;
        _ = splice(client, server, moved) => return Over::Ended,
        () = tunnel.end(rest) => Over::Rest,
        () = tunnel.idle(idle) => Over::Idle,
    };
    let _ = timeout(GOODBYE, async { tokio::join!(client.shutdown(), server.shutdown()) }).await;
    over
}

/// When a tunnel, whose bytes nobody understands, ends for its root's sake.
#[derive(Debug, Default)]
struct Tunnel {
    moved: AtomicBool,
    client_waits: AtomicBool,
    moves: AtomicU64,
}

impl Tunnel {
    /// Bytes have passed.
    fn moved(&self, bytes: Transferred) {
        self.moved.store(true, Relaxed);
        self.moves.fetch_add(1, Relaxed);
        self.client_waits.store(bytes.server_to_client == 0, Relaxed);
    }

    /// Returns once nothing has moved for so long; twice as long at most.
    async fn idle(&self, time: Option<Duration>) {
        let Some(time) = time else { return pending().await };
        let mut seen = self.moves.load(Relaxed);
        loop {
            sleep(time).await;
            let before = std::mem::replace(&mut seen, self.moves.load(Relaxed));
            if before == seen {
                return;
            }
        }
    }

    /// Returns once the root is no longer believed and the tunnel is between two questions: the server has had the last
    /// word, and nothing has moved since for a while. After [`LAST`] in any case.
    async fn end(&self, rest: Option<Rest>) {
        dropped(rest).await;
        let deadline = Instant::now() + LAST;
        let quiet = async {
            loop {
                self.moved.store(false, Relaxed);
                sleep(SILENCE).await;
                if !self.moved.load(Relaxed) && !self.client_waits.load(Relaxed) {
                    return;
                }
            }
        };
        let _ = timeout_at(deadline, quiet).await;
    }
}

#[cfg(test)]
mod tests {
    use sheetbend_certs::{Ca, Csr, IssueRequest, KeyAndCsr, TrustDomain};

    use super::*;

    const ASKED: Transferred = Transferred { client_to_server: 1, server_to_client: 0 };
    const ANSWERED: Transferred = Transferred { client_to_server: 0, server_to_client: 1 };

    /// A CA, and a store with a certificate of it.
    fn mesh() -> (tempfile::TempDir, Ca, IdentityStore) {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::init(&dir.path().join("ca"), &"cluster.local".parse::<TrustDomain>().unwrap(), SystemTime::now());
        let (ca, store) = (ca.unwrap(), IdentityStore::new());
        renew(&ca, &store);
        (dir, ca, store)
    }

    fn renew(ca: &Ca, store: &IdentityStore) {
        let (now, key) = (SystemTime::now(), KeyAndCsr::generate().unwrap());
        let id = "spiffe://cluster.local/ns/default/sa/web".parse().unwrap();
        let issued = ca.issue(&IssueRequest::new(id, Csr::parse(key.csr_der()).unwrap()), now).unwrap();
        store.install(key.into_identity(issued.chain).unwrap(), issued.bundle, now).unwrap();
    }

    /// Whether a future is over within a second of the stopped clock.
    async fn is_over(future: &mut std::pin::Pin<Box<impl Future<Output = ()>>>) -> bool {
        tokio::time::timeout(Duration::from_secs(1), future).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_outlives_new_certificates_and_new_roots_but_not_the_end_of_its_own() {
        let (_dir, ca, store) = mesh();
        let mut dropped = Box::pin(Rest::on(ca.active_root().unwrap().sha256(), &store).dropped());
        renew(&ca, &store);
        assert!(!is_over(&mut dropped).await, "another leaf");
        ca.rotate(SystemTime::now()).unwrap();
        renew(&ca, &store);
        assert!(!is_over(&mut dropped).await, "another root beside it");
        ca.drop_old().unwrap();
        renew(&ca, &store);
        assert!(is_over(&mut dropped).await, "its root is gone");
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_ends_between_two_questions_and_never_while_an_answer_is_awaited() {
        let (_dir, ca, store) = mesh();
        let rest = Rest::on(ca.active_root().unwrap().sha256(), &store);
        ca.rotate(SystemTime::now()).unwrap();
        ca.drop_old().unwrap();
        renew(&ca, &store);
        let (tunnel, began) = (Tunnel::default(), Instant::now());
        tunnel.moved(ASKED);
        let mut end = Box::pin(tunnel.end(Some(rest.clone())));
        for _ in 0..30 {
            assert!(!is_over(&mut end).await, "an answer is awaited");
        }
        tunnel.moved(ANSWERED);
        end.await;
        assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
        // One that never pauses ends too.
        let (tunnel, began) = (Tunnel::default(), Instant::now());
        tunnel.moved(ASKED);
        tunnel.end(Some(rest)).await;
        assert_eq!(began.elapsed(), LAST);
    }
}
