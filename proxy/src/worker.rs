//! One thread, one current-thread runtime, its own pools. The only file that knows the threading model.

use std::net::{Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use bytes::BytesMut;
use futures_util::FutureExt;
use sheetbend_control_plane_client::model::Target;
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::app::Shared;
use crate::http::error::Error;
use crate::http::story::Caught;
use crate::inbound::{Inbound, Port};
use crate::listen::{Accepted, Listener, original_destination};
use crate::outbound::Outbound;
use crate::proc_net;
use crate::refuse::refuse;
use crate::route::Routes;
use crate::telemetry::{Counter, Reporter};
use crate::upstream::{Entering, Own, Pool};

/// What others see of a worker.
#[derive(Default)]
pub(crate) struct Worker {
    /// Connections of the app that it carries.
    pub(crate) outbound: AtomicUsize,
    /// Connections for the app that it carries.
    pub(crate) inbound: AtomicUsize,
    /// Its connections to endpoints; there once it runs.
    pub(crate) pool: OnceLock<Arc<Pool>>,
}

impl Worker {
    fn live(&self) -> usize {
        self.outbound.load(Relaxed) + self.inbound.load(Relaxed)
    }
}

/// A connection that a worker carries, until this is dropped.
pub(crate) struct Live {
    worker: Arc<Worker>,
    inbound: bool,
}

impl Live {
    fn begin(worker: &Arc<Worker>, inbound: bool) -> Arc<Self> {
        let live = Self { worker: Arc::clone(worker), inbound };
        live.count().fetch_add(1, Relaxed);
        Arc::new(live)
    }

    fn count(&self) -> &AtomicUsize {
        if self.inbound { &self.worker.inbound } else { &self.worker.outbound }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.count().fetch_sub(1, Relaxed);
    }
}

/// Work for a worker.
pub(crate) enum Job {
    Redirected(Accepted),
    Explicit(Accepted),
    Fixed(Accepted, Target),
    Transparent(Accepted),
    Inbound(Accepted, Arc<Port>),
}

impl Job {
    /// How the requests on such a connection come to this proxy.
    fn caught(&self) -> Caught {
        match self {
            Self::Explicit(_) => Caught::Explicit,
            Self::Fixed(..) => Caught::LocalPort,
            Self::Transparent(_) | Self::Redirected(_) | Self::Inbound(..) => Caught::Redirected,
        }
    }

    fn is_inbound(&self) -> bool {
        matches!(self, Self::Inbound(..) | Self::Redirected(..))
    }
}

type Jobs = mpsc::UnboundedSender<(Job, Arc<Live>)>;

/// Threads that carry traffic.
pub(crate) struct Workers {
    // Unbounded, yet bounded by the file table: every job is an accepted connection.
    workers: Vec<(Arc<Worker>, Jobs)>,
    shared: Arc<Shared>,
}

impl Workers {
    /// Starts a thread for each of the workers that `shared` names.
    pub(crate) fn start(shared: &Arc<Shared>) -> std::io::Result<Self> {
        let mut workers = Vec::new();
        for (number, worker) in shared.workers.iter().enumerate() {
            let (sender, mut jobs) = mpsc::unbounded_channel::<(Job, Arc<Live>)>();
            workers.push((Arc::clone(worker), sender));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let (shared, worker) = (Arc::clone(shared), Arc::clone(worker));
            std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
                // What this worker sends to the app beside it. Bounded as the connections that ask for it are.
                let (entrance, mut entering) = mpsc::unbounded_channel::<Entering>();
                let own = Own::new(Arc::clone(&shared.here), shared.discovery.clone(), &entrance);
                let pool = Arc::clone(worker.pool.get_or_init(|| Arc::new(Pool::new(own))));
                let routes = Arc::new(Routes::default());
                runtime.block_on(async {
                    tokio::spawn(Arc::clone(&pool).follow(shared.identity.subscribe()));
                    tokio::spawn(Arc::clone(&routes).follow(shared.discovery.clone(), Arc::clone(&shared.endpoints)));
                    loop {
                        // In no order, and nothing is lost: a queue keeps what is not taken.
                        tokio::select! {
                            job = jobs.recv() => {
                                let Some((job, live)) = job else { return };
                                let caught = job.caught();
                                let outbound = Outbound {
                                    caught,
                                    shared: Arc::clone(&shared),
                                    pool: Arc::clone(&pool),
                                    routes: Arc::clone(&routes),
                                    live,
                                };
                                tokio::spawn(carry(job, outbound));
                            }
                            Some(Entering { io, port, destination, alpn }) = entering.recv() => {
                                let (shared, pool) = (Arc::clone(&shared), Arc::clone(&pool));
                                tokio::spawn(Inbound { shared, pool, port }.entered(io, alpn, destination));
                            }
                        }
                    }
                });
            })?;
        }
        Ok(Self { workers, shared: Arc::clone(shared) })
    }

    /// Accepts, and gives each connection to the worker that carries the fewest.
    pub(crate) fn feed(
        &self,
        listener: Listener,
        job: impl Fn(Accepted) -> Job + Send + Sync + 'static,
    ) -> tokio::task::JoinHandle<()> {
        let workers = self.workers.clone();
        let telemetry = Arc::clone(&self.shared.telemetry);
        let mut listener = listener.counting(telemetry.handle(Counter::RefusedOverload));
        tokio::spawn(async move {
            loop {
                let job = job(listener.accept().await);
                let inbound = job.is_inbound();
                telemetry.count(if inbound { Counter::AcceptedInbound } else { Counter::AcceptedOutbound });
                let Some((worker, jobs)) = workers.iter().min_by_key(|(worker, _)| worker.live()) else { return };
                // Fails only when the thread is gone, and the process with it.
                let _ = jobs.send((job, Live::begin(worker, inbound)));
            }
        })
    }
}

/// Each way is in a box of its own: a connection holds no room for those that it does not take.
async fn carry(job: Job, outbound: Outbound) {
    let (accepted, job) = match job {
        Job::Explicit(accepted) => (accepted, Kind::Explicit),
        Job::Fixed(accepted, target) => (accepted, Kind::Fixed(target)),
        Job::Transparent(accepted) => (accepted, Kind::Transparent),
        Job::Inbound(accepted, port) => (accepted, Kind::Inbound(port)),
        Job::Redirected(accepted) => (accepted, Kind::Redirected),
    };
    let peer = accepted.peer;
    let (stream, ours) = match accepted.register().and_then(|stream| stream.local_addr().map(|ours| (stream, ours))) {
        Ok(known) => known,
        Err(error) => {
            if let Some(left_out) = outbound.shared.telemetry.refused(Counter::RefusedOverload) {
                tracing::warn!(%peer, %error, left_out, "a connection cannot be carried: closed");
            }
            return;
        }
    };
    match job {
        Kind::Explicit if outbound.shared.takes(ours, peer) => outbound.explicit(Box::new(stream), peer).await,
        Kind::Fixed(target) if outbound.shared.takes(ours, peer) => {
            outbound.caught(Box::new(stream), target, peer).boxed().await;
        }
        Kind::Explicit | Kind::Fixed(_) => {}
        Kind::Transparent => match original(&stream).and_then(|original| of_the_app(original, peer)) {
            Ok(original) => outbound.caught(Box::new(stream), Target::from(original), peer).boxed().await,
            Err(error) => {
                let nothing = BytesMut::new();
                refuse(&outbound.shared, Reporter::Source, Box::new(stream), nothing, error, peer).boxed().await;
            }
        },
        Kind::Redirected => {
            let here = &outbound.shared.here;
            let _live = outbound.live;
            match original(&stream).and_then(|original| here.port_at(original).ok_or(Error::Loop(original))) {
                Ok(port) => {
                    let inbound = Inbound { shared: outbound.shared, pool: outbound.pool, port };
                    inbound.connection(Box::new(stream), peer).boxed().await;
                }
                Err(error) => {
                    let nothing = BytesMut::new();
                    refuse(&outbound.shared, Reporter::Destination, Box::new(stream), nothing, error, peer)
                        .boxed()
                        .await;
                }
            }
        }
        Kind::Inbound(port) => {
            // Held for as long as the connection is carried.
            let _live = outbound.live;
            let inbound = Inbound { shared: outbound.shared, pool: outbound.pool, port };
            inbound.connection(Box::new(stream), peer).boxed().await;
        }
    }
}

/// Where a redirected connection was going.
fn original(stream: &TcpStream) -> Result<SocketAddr, Error> {
    let ours = stream.local_addr().unwrap_or(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)));
    let unknown = || Error::NotRedirected(SocketAddr::new(ours.ip().to_canonical(), ours.port()));
    match original_destination(stream) {
        Ok(original) => original.ok_or_else(unknown),
        Err(error) => {
            tracing::warn!(%ours, %error, "the kernel does not say where a connection was going");
            Err(unknown())
        }
    }
}

/// A proxy that is caught itself would go on dialing itself for ever.
fn of_the_app(original: SocketAddr, peer: SocketAddr) -> Result<SocketAddr, Error> {
    let user = rustix::process::getuid().as_raw();
    match proc_net::owner_of_peer(original, peer) {
        Ok(Some(owner)) if owner == user => Err(Error::OwnConnection { to: original, user }),
        _ => Ok(original),
    }
}

enum Kind {
    Redirected,
    Explicit,
    Fixed(Target),
    Transparent,
    Inbound(Arc<Port>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_counts_until_the_last_who_holds_it_lets_go() {
        let worker = Arc::new(Worker::default());
        let first = Live::begin(&worker, true);
        let second = Live::begin(&worker, false);
        let also_second = Arc::clone(&second);
        assert_eq!((worker.inbound.load(Relaxed), worker.outbound.load(Relaxed), worker.live()), (1, 1, 2));
        drop((first, second));
        assert_eq!(worker.live(), 1);
        drop(also_second);
        assert_eq!(worker.live(), 0);
    }
}
