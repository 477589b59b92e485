//! The HTTP connections of one worker: shared HTTP/2 between our proxies, kept HTTP/1.1 elsewhere.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use hyper::client::conn::{http1, http2};
use hyper_util::rt::TokioIo;
use sheetbend_certs::{IdentityStore, Material, MeshAlpn, Sha256, TrustBundle};
use sheetbend_control_plane_client::model::Transport;
use tokio::sync::{oneshot, watch};
use tokio::time::MissedTickBehavior;

use super::first_word::{FirstWord, Word};
use super::sender::{Sender, Wire, connect_h2, until_over};
use super::turn::{Turn, Turns, WAITS};
use super::{Bounds, DialError, Dialed, EndpointState, Lease, Own, Permit, STREAMS, dial};
use crate::http::body::RequestBody;
use crate::rest::Rest;
use crate::telemetry::Telemetry;
use crate::traffic::limit::Limit;

/// Streams on one shared connection before another is dialed: 80 % of the [`STREAMS`] that our proxies allow. Where a peer allows
/// fewer, 80 % of those: hyper would queue the rest without saying so.
const FULL: usize = STREAMS as usize * 80 / 100;
/// Shared connections to one endpoint that one worker keeps though nothing is under way on them. While something is,
/// there are as many as it takes: a request that waits for another's stream would be coupled to a stranger.
const IDLE_SHARED: usize = 2;
/// Kept connections to one endpoint, for one worker.
const MOST_KEPT: usize = 1024;
/// How long a kept connection is trusted to be open at the other end, unless a policy says so.
const KEPT_FOR: Duration = Duration::from_secs(3);
/// How long ago a connection may have been used that takes what must not be sent twice: no server gives it up so soon.
const RECENTLY: Duration = Duration::from_secs(1);
/// How often those are ended that nobody needs.
const TIDY: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Connections {
    shared: Vec<SharedConnection>,
    /// The one used last is at the end.
    kept: VecDeque<Kept>,
    turns: Arc<Turns>,
    bounds: Arc<Bounds>,
    /// Whether the endpoint is of the mesh.
    mesh: bool,
    /// The endpoint chose HTTP/1.1 when it was asked for either: nothing is shared, and nobody takes turns.
    chose_http1: bool,
}

/// Which connections with nothing on them serve a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// Any that is open.
    Any,
    /// One that was used a moment ago: what must not be sent twice hardly ever meets its end.
    Recent,
    /// None: it is to be new.
    Never,
}

/// A connection that waits for its next request.
struct Kept {
    sender: http1::SendRequest<RequestBody>,
    since: Instant,
    rest: Option<Rest>,
    /// Requests so far.
    carried: u64,
    /// As long as the server says that it keeps it.
    promised: Option<Duration>,
}

impl Kept {
    fn is_over(&self, bounds: &Bounds, now: Instant) -> bool {
        let most = kept_for(bounds);
        now - self.since >= self.promised.map_or(most, |promised| promised.min(most))
    }
}

/// A connection that many requests share.
struct SharedConnection {
    sender: http2::SendRequest<RequestBody>,
    /// Under way on it.
    streams: Arc<AtomicUsize>,
    /// Requests so far.
    carried: u64,
    /// As many as the peer allows at the moment.
    allowed: Arc<AtomicUsize>,
    root: Option<Sha256>,
    word: Option<Arc<Word>>,
    /// What it had carried when nothing was seen on it first, and when that was.
    unused: Option<(u64, Instant)>,
}

impl SharedConnection {
    /// Whether it has carried nothing for so long, as far as it was looked at.
    fn is_idle(&mut self, most: Duration, now: Instant) -> bool {
        if self.streams.load(Relaxed) > 0 {
            self.unused = None;
            return false;
        }
        match self.unused {
            Some((carried, since)) if carried == self.carried => now - since >= most,
            _ => {
                self.unused = Some((self.carried, now));
                false
            }
        }
    }

    fn is_full(&self) -> bool {
        let allowed = (self.allowed.load(Relaxed) / 5).saturating_mul(4).clamp(1, FULL);
        self.streams.load(Relaxed) >= allowed
    }
}

/// One more stream of a shared connection, its count, and what the endpoint said first there.
type Stream = (http2::SendRequest<RequestBody>, Arc<AtomicUsize>, Option<Arc<Word>>);

/// How many connections are kept or shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pooled {
    /// To endpoints of the mesh.
    pub(crate) mesh: usize,
    /// To the app, and outside the mesh.
    pub(crate) plain: usize,
}

/// The connections of one worker. The lock is never contended: one thread uses it.
pub struct Pool {
    connections: Mutex<All>,
    /// What this proxy itself serves.
    pub(crate) own: Own,
}

#[derive(Default)]
struct All {
    /// By the endpoint's number.
    of: HashMap<u64, Connections>,
    /// Whom this proxy believes now. What rests on another root takes no more requests.
    bundle: Option<Arc<TrustBundle>>,
    /// Our own certificate has ended: nothing within the mesh takes any.
    is_over: bool,
}

impl All {
    fn of(&mut self, endpoint: &EndpointState) -> &mut Connections {
        let connections = self.of.entry(endpoint.number).or_default();
        connections.mesh = endpoint.identity().is_some();
        if !Arc::ptr_eq(&connections.bounds, &endpoint.bounds) {
            connections.bounds = Arc::clone(&endpoint.bounds);
        }
        connections
    }

    /// What rests on no root needs none to be believed.
    fn believes(&self, root: Option<Sha256>) -> bool {
        let in_bundle = |root| self.bundle.as_ref().is_none_or(|bundle| bundle.contains(root));
        root.is_none_or(|root| !self.is_over && in_bundle(root))
    }
}

/// What comes of the wish for one more connection.
enum Room {
    /// One was free meanwhile.
    Ready(Sender),
    /// One may be dialed; counted by this.
    ToDial(Arc<Permit>),
}

/// One use of a connection.
pub struct Checkout {
    pool: Arc<Pool>,
    endpoint: Arc<EndpointState>,
    /// Taken back only when the exchange ended well.
    sender: Option<http1::SendRequest<RequestBody>>,
    streams: Option<Arc<AtomicUsize>>,
    /// Of a shared connection to who was not asked whether it speaks HTTP/2.
    word: Option<Arc<Word>>,
    /// What the connection rests on, where it has one of its own.
    rest: Option<Rest>,
    /// Counts a connection of its own that is new, so that what it is turned into counts too.
    permit: Option<Arc<Permit>>,
    /// Requests that its own connection carries or has carried.
    carried: u64,
    /// As long as the server says that it keeps its own connection.
    promised: Option<Duration>,
}

impl Checkout {
    fn begin(pool: &Arc<Pool>, endpoint: &Arc<EndpointState>) -> Self {
        endpoint.vitals.load.begin();
        let (pool, endpoint) = (Arc::clone(pool), Arc::clone(endpoint));
        Self {
            pool,
            endpoint,
            sender: None,
            streams: None,
            word: None,
            rest: None,
            permit: None,
            carried: 1,
            promised: None,
        }
    }

    /// The exchange has ended well: the connection may serve another.
    pub fn give_back(mut self) {
        if let Some(sender) = self.sender.take().filter(|sender| !sender.is_closed()) {
            let mut all = self.pool.lock();
            if !all.believes(self.rest.as_ref().map(Rest::root)) || self.endpoint.bounds.limits.is_used_up(self.carried)
            {
                return;
            }
            let kept = &mut all.of(&self.endpoint).kept;
            if kept.len() < MOST_KEPT {
                let (rest, carried, promised) = (self.rest.take(), self.carried, self.promised);
                kept.push_back(Kept { sender, since: Instant::now(), rest, carried, promised });
                self.endpoint.bounds.tell_next();
            }
        }
    }

    /// Keeps the sender of an HTTP/1.1 connection until the answer has been read.
    pub fn holding(mut self, sender: Sender) -> Self {
        if let Sender::Http1(sender) = sender {
            self.sender = Some(sender);
        }
        self
    }

    /// Dials, for whoever asked and for those who come after: a handshake goes on though nobody waits for it any more, and
    /// somebody in haste does not end what the next one needs.
    async fn dialed(
        mut self,
        wire: Wire,
        permit: Arc<Permit>,
        turn: Option<Turn>,
        identity: &Arc<IdentityStore>,
        telemetry: &Arc<Telemetry>,
    ) -> Result<(Sender, Self), DialError> {
        if turn.is_none() && self.endpoint.transport == Transport::Plain {
            // No handshake: what a request in haste begins is worth nothing to others, and there may be many.
            return Ok((self.dial(wire, permit, identity, telemetry).await?, self));
        }
        let (identity, telemetry) = (Arc::clone(identity), Arc::clone(telemetry));
        let (tell, told) = oneshot::channel();
        tokio::spawn(async move {
            let dialed = match self.dial(wire, permit, &identity, &telemetry).await {
                Ok(sender) => {
                    drop(turn);
                    Ok((sender, self))
                }
                Err(error) => Err(match turn {
                    Some(turn) => turn.fail(error, !tell.is_closed()),
                    None => error,
                }),
            };
            if let Err(Ok((sender, unused))) = tell.send(dialed) {
                unused.holding(sender).give_back();
            }
        });
        // Nothing but a worker that ends keeps it from being told.
        told.await.unwrap_or(Err(DialError::NoTurn))
    }

    /// A new connection. By [`Wire::Http2`] it is to be shared, unless the endpoint chooses HTTP/1.1.
    async fn dial(
        &mut self,
        wire: Wire,
        permit: Arc<Permit>,
        identity: &IdentityStore,
        telemetry: &Telemetry,
    ) -> Result<Sender, DialError> {
        let endpoint = Arc::clone(&self.endpoint);
        let alpn = if wire == Wire::Http1 { MeshAlpn::Http1 } else { MeshAlpn::H2 };
        let dialed = dial(&endpoint, alpn, identity, telemetry, &self.pool.own).await?;
        let mut dialed = Dialed { permit: Some(permit), ..dialed };
        if wire == Wire::Http1 {
            return self.alone(dialed).await;
        }
        self.pool.lock().of(&endpoint).chose_http1 = !dialed.http2;
        if !dialed.http2 {
            return self.alone(dialed).await;
        }
        if endpoint.transport == Transport::Plain {
            // Nobody has asked it whether it speaks HTTP/2.
            let word = Word::of(&endpoint.spoke_http2);
            self.word = Some(Arc::clone(&word));
            dialed.io = Box::new(FirstWord::new(dialed.io, word));
        }
        let root = dialed.rest.as_ref().map(Rest::root);
        let (sender, allowed) = connect_h2(dialed, endpoint.is_ours()).await?;
        let streams = Arc::new(AtomicUsize::new(1));
        self.streams = Some(Arc::clone(&streams));
        let mut all = self.pool.lock();
        if all.believes(root) {
            let (sender, word) = (sender.clone(), self.word.clone());
            let shared = SharedConnection { sender, streams, carried: 1, allowed, root, word, unused: None };
            if !endpoint.bounds.limits.is_used_up(shared.carried) {
                all.of(&endpoint).shared.push(shared);
            }
        }
        Ok(Sender::Http2(sender))
    }

    /// HTTP/1.1 on a new connection, for this use and perhaps others after it.
    async fn alone(&mut self, dialed: Dialed) -> Result<Sender, DialError> {
        let builder = http1::Builder::new().max_headers(100).clone();
        let (sender, connection) = builder.handshake(TokioIo::new(dialed.io)).await.map_err(DialError::Http)?;
        self.rest = dialed.rest;
        self.permit = dialed.permit.clone();
        let (rest, permit) = (self.rest.clone(), dialed.permit);
        // Its end is told to whoever has a request on it.
        tokio::spawn(async move {
            let _permit = permit;
            until_over(connection.with_upgrades(), rest).await;
        });
        Ok(Sender::Http1(sender))
    }

    /// The server keeps the connection for so long when nothing is on it. What is sent in the last second may miss it.
    pub fn is_kept_for(&mut self, time: Duration) {
        self.promised = Some(time.saturating_sub(Duration::from_secs(1)));
    }

    /// Whether the endpoint answered in something else than HTTP/2, of which it knows nothing.
    pub fn is_misunderstood(&self) -> bool {
        self.word.as_ref().is_some_and(|word| word.knows_no_http2())
    }

    /// What an HTTP/1.1 connection rests on, for when it leaves HTTP behind.
    pub fn rest(&self) -> Option<&Rest> {
        self.rest.as_ref()
    }

    /// What counts a new HTTP/1.1 connection, for when it leaves HTTP behind.
    pub fn permit(&self) -> Option<&Arc<Permit>> {
        self.permit.as_ref()
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        self.endpoint.vitals.load.end();
        if let Some(streams) = &self.streams {
            streams.fetch_sub(1, Relaxed);
            self.endpoint.bounds.tell_waiting();
        }
    }
}

impl Pool {
    /// Without a connection yet.
    pub(crate) fn new(own: Own) -> Self {
        Self { connections: Mutex::default(), own }
    }

    /// A connection to `endpoint` that is there already, if one serves: [`Pool::checkout`] without the wait.
    pub fn ready(
        self: &Arc<Self>,
        endpoint: &Arc<EndpointState>,
        wire: Wire,
        reuse: Reuse,
    ) -> Option<(Sender, Checkout)> {
        let mut checkout = Checkout::begin(self, endpoint);
        let sender = self.take(wire, reuse, &mut checkout)?;
        Some((sender, checkout))
    }

    /// A connection to the endpoint of `lease`, kept or new.
    ///
    /// An endpoint that is not ours and is asked for [`Wire::Http2`] chooses: what comes back may be [`Sender::Http1`].
    pub async fn checkout(
        self: &Arc<Self>,
        lease: &mut Lease,
        (wire, reuse): (Wire, Reuse),
        identity: &Arc<IdentityStore>,
        telemetry: &Arc<Telemetry>,
    ) -> Result<(Sender, Checkout), DialError> {
        let mut checkout = Checkout::begin(self, &lease.endpoint);
        self.sweep();
        if let Some(sender) = self.take(wire, reuse, &mut checkout) {
            return Ok((sender, checkout));
        }
        let mut turn = match self.turns(&lease.endpoint).filter(|_| wire == Wire::Http2) {
            Some(turns) => Some(turns.take().await?),
            None => None,
        };
        if let Some(turn) = &mut turn {
            // Whoever had the turn before may have dialed what serves us too, or may have failed for us too.
            if let Some(sender) = self.take(wire, reuse, &mut checkout) {
                return Ok((sender, checkout));
            }
            if let Some(failure) = turn.failed_meanwhile() {
                return Err(failure);
            }
        }
        match self.room(wire, reuse, &mut checkout).await {
            Ok(Room::Ready(sender)) => Ok((sender, checkout)),
            Ok(Room::ToDial(permit)) => {
                lease.dials();
                checkout.dialed(wire, permit, turn, identity, telemetry).await
            }
            Err(error) => Err(match turn {
                Some(turn) => turn.fail(error, true),
                None => error,
            }),
        }
    }

    /// The turns of those who dial what is shared; none where nothing is.
    fn turns(&self, endpoint: &EndpointState) -> Option<Arc<Turns>> {
        let mut all = self.lock();
        let connections = all.of(endpoint);
        (!connections.chose_http1).then(|| Arc::clone(&connections.turns))
    }

    /// Room for one more connection; where the destination has as many as it may, the wait for one of them.
    async fn room(self: &Arc<Self>, wire: Wire, reuse: Reuse, checkout: &mut Checkout) -> Result<Room, DialError> {
        let bounds = Arc::clone(&checkout.endpoint.bounds);
        bounds.dialed_by(self);
        if let Some(permit) = bounds.take(Limit::Connections) {
            return Ok(Room::ToDial(Arc::new(permit)));
        }
        let room = bounds.until(|| {
            if let Some(sender) = self.take(wire, reuse, checkout) {
                return Some(Room::Ready(sender));
            }
            // What is kept for nothing but the next request, to whichever of its endpoints and by whichever worker, is
            // given up; its end is told like any other's.
            let permit = bounds.take(Limit::Connections);
            if permit.is_none() {
                bounds.pools().iter().any(|pool| pool.drop_idle(&bounds));
            }
            permit.map(|permit| Room::ToDial(Arc::new(permit)))
        });
        tokio::time::timeout(WAITS, room).await.map_err(|_| DialError::WaitedTooLong(Limit::Connections))
    }

    /// Lets go of one connection on which nothing is under way, if there is one.
    fn drop_idle(&self, bounds: &Arc<Bounds>) -> bool {
        let mut all = self.lock();
        let of = all.of.values_mut().filter(|connections| Arc::ptr_eq(&connections.bounds, bounds));
        of.into_iter().any(|connections| {
            connections.kept.retain(|kept| !kept.sender.is_closed());
            connections.shared.retain(|shared| !shared.sender.is_closed());
            let idle = connections.shared.iter().position(|shared| shared.streams.load(Relaxed) == 0);
            connections.kept.pop_front().is_some() || idle.map(|at| connections.shared.swap_remove(at)).is_some()
        })
    }

    /// Follows the bundle for as long as it is polled: connections that rest on a root which is no longer believed take
    /// no more requests, finish those they have, and end.
    pub(crate) async fn follow(self: Arc<Self>, mut changes: watch::Receiver<Option<Arc<Material>>>) {
        let mut tidy = tokio::time::interval(TIDY);
        tidy.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let material = changes.borrow_and_update().clone();
            if let Some(material) = material {
                self.believe(&material);
            }
            loop {
                // Either may be lost: both come again.
                tokio::select! {
                    changed = changes.changed() => match changed {
                        Ok(()) => break,
                        Err(_) => return,
                    },
                    _ = tidy.tick() => self.tidy(Instant::now()),
                }
            }
        }
    }

    /// Ends connections that have had no request for as long as they may.
    fn tidy(&self, now: Instant) {
        for connections in self.lock().of.values_mut() {
            connections.forget(now);
            if let Some(most) = connections.bounds.limits.http_idle() {
                connections.shared.retain_mut(|shared| !shared.is_idle(most, now));
            }
        }
    }

    fn believe(&self, material: &Material) {
        let mut all = self.lock();
        all.bundle = Some(Arc::clone(&material.bundle));
        all.is_over = material.is_over(SystemTime::now());
        let mut of = std::mem::take(&mut all.of);
        for connections in of.values_mut() {
            connections.shared.retain(|shared| all.believes(shared.root));
            connections.kept.retain(|kept| all.believes(kept.rest.as_ref().map(Rest::root)));
        }
        all.of = of;
    }

    /// A panic while the lock is held leaves maps that are still whole.
    fn lock(&self) -> MutexGuard<'_, All> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many connections there are now. For the admin port: takes the worker's lock for a moment.
    pub(crate) fn pooled(&self) -> Pooled {
        let (mut pooled, now) = (Pooled::default(), Instant::now());
        for connections in self.lock().of.values() {
            let shared = connections.shared.iter().filter(|shared| !shared.sender.is_closed()).count();
            let kept = connections
                .kept
                .iter()
                .filter(|kept| kept.sender.is_ready() && !kept.is_over(&connections.bounds, now))
                .count();
            let count = if connections.mesh { &mut pooled.mesh } else { &mut pooled.plain };
            *count += shared + kept;
        }
        pooled
    }

    /// Lets go of endpoints that are gone, once there are many.
    fn sweep(&self) {
        const MANY: usize = 1024;
        let of = &mut self.lock().of;
        if of.len() >= MANY {
            of.retain(|_, connections| {
                connections.forget(Instant::now());
                connections.kept.retain(|kept| !kept.sender.is_closed());
                connections.shared.retain(|shared| !shared.sender.is_closed());
                !connections.kept.is_empty() || !connections.shared.is_empty()
            });
        }
    }

    /// What is there already, if it serves.
    fn take(&self, wire: Wire, reuse: Reuse, checkout: &mut Checkout) -> Option<Sender> {
        let chooses = matches!(checkout.endpoint.transport, Transport::MutualTls(_));
        let mut all = self.lock();
        let connections = all.of.get_mut(&checkout.endpoint.number)?;
        let limits = &checkout.endpoint.bounds.limits;
        if wire == Wire::Http2
            && let Some((sender, streams, word)) = connections.take_shared(|carried| limits.is_used_up(carried))
        {
            (checkout.streams, checkout.word) = (Some(streams), word);
            return Some(Sender::Http2(sender));
        }
        if reuse == Reuse::Never || (wire == Wire::Http2 && !chooses) {
            return None;
        }
        let kept = connections.take_kept(reuse)?;
        (checkout.rest, checkout.carried) = (kept.rest, kept.carried + 1);
        Some(Sender::Http1(kept.sender))
    }
}

/// How long a connection stays without a request.
fn kept_for(bounds: &Bounds) -> Duration {
    bounds.limits.http_idle().unwrap_or(KEPT_FOR)
}

impl Connections {
    /// Ends those that were kept for as long as they may be.
    fn forget(&mut self, now: Instant) {
        while self.kept.front().is_some_and(|kept| kept.is_over(&self.bounds, now)) {
            self.kept.pop_front();
        }
    }

    fn take_kept(&mut self, reuse: Reuse) -> Option<Kept> {
        let now = Instant::now();
        self.forget(now);
        let serves = |kept: &Kept| reuse == Reuse::Any || now - kept.since < RECENTLY;
        // The one used last is the likeliest to be open still; one that is not ready has closed.
        while self.kept.back().is_some_and(serves) {
            let kept = self.kept.pop_back().filter(|kept| kept.sender.is_ready() && !kept.is_over(&self.bounds, now));
            if kept.is_some() {
                return kept;
            }
        }
        None
    }

    /// The shared connection with the fewest streams, if it has room.
    fn take_shared(&mut self, is_used_up: impl FnOnce(u64) -> bool) -> Option<Stream> {
        let mut idle = 0;
        self.shared.retain(|shared| {
            let unused = shared.streams.load(Relaxed) == 0;
            idle += usize::from(unused);
            !shared.sender.is_closed() && (!unused || idle <= IDLE_SHARED)
        });
        let streams = |at: &usize| self.shared.get(*at).map_or(usize::MAX, |shared| shared.streams.load(Relaxed));
        let at = (0..self.shared.len()).min_by_key(streams)?;
        let emptiest = self.shared.get_mut(at).filter(|shared| !shared.is_full())?;
        emptiest.streams.fetch_add(1, Relaxed);
        emptiest.carried += 1;
        let taken = (emptiest.sender.clone(), Arc::clone(&emptiest.streams), emptiest.word.clone());
        if is_used_up(emptiest.carried) {
            // It ends with the last of its streams.
            self.shared.swap_remove(at);
        }
        Some(taken)
    }
}
