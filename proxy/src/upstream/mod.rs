//! Endpoints and the connections to them.
//!
//! - [`EndpointState`]: one place that can answer, with what is learned about it. Shared by all workers, kept across
//!   snapshots.
//! - [`Bounds`]: how much may be under way to a destination at once, and what is.
//! - `dial`: TCP, and mutual TLS where the endpoint is meshed. A meshed endpoint is never dialed in plain.
//! - `own`: endpoints that are this proxy itself, handed to its inbound side.
//! - [`Pool`]: the HTTP connections of one worker.

mod bounds;
mod dial;
mod first_word;
pub(crate) mod health;
mod lease;
pub(crate) mod names;
mod own;
mod pool;
mod sender;
mod table;
mod turn;
mod windows;

use std::collections::HashMap;
use std::fmt;
use std::hash::RandomState;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use sheetbend_certs::SpiffeId;
use sheetbend_control_plane_client::model::{ClusterName, RateLimit, RetryConstraint, ServicePort, Target, Transport};

pub use bounds::{Bounds, Permit};
pub use dial::{BoxIo, DialError, Io};
pub(crate) use dial::{Dialed, dial};
pub use lease::{Lease, Stage};
pub(crate) use own::{Entering, Own};
pub(crate) use pool::Pooled;
pub use pool::{Checkout, Pool, Reuse};
pub(crate) use sender::HEADERS;
pub use sender::{SendError, Sender, Wire};
pub(crate) use windows::{STREAMS, Windows};

use table::Table;

use crate::telemetry::{Edge, EdgeKey, Peer, Protocol, Reporter, Telemetry};
use crate::traffic::breaker::Shown;
use crate::traffic::limit::Limit;
use crate::traffic::outlier::{Detection, Floor, NotEjected, Tally, Vitals};
use crate::traffic::rate::Rate;
use crate::traffic::retry::Budget;

/// Where an endpoint is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// An address, from the control plane or from the kernel.
    Address(SocketAddr),
    /// A name that is no part of the mesh: looked up for every connection.
    Name(Target),
    /// The app beside this proxy.
    App(SocketAddr),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) | Self::App(address) => address.fmt(f),
            Self::Name(target) => target.fmt(f),
        }
    }
}

/// One place that can answer.
pub struct EndpointState {
    /// Where.
    pub place: Place,
    /// How it is spoken to.
    pub transport: Transport,
    /// What it is part of, and the trust domain of that: the SNI. `None` outside the mesh.
    pub service: Option<(ServicePort, Arc<str>)>,
    /// What is learned of it.
    pub vitals: Arc<Vitals>,
    backend: Option<ClusterName>,
    /// How much may be under way to what it is part of.
    pub bounds: Arc<Bounds>,
    /// Who else is in its backend; nobody ejects what is alone.
    floor: Option<Arc<Floor>>,
    /// The start of the clock by which loads and ejections count.
    epoch: Instant,
    /// Never given to another: the key of its connections.
    number: u64,
    spoke_http2: Arc<AtomicBool>,
    edges: [OnceLock<Arc<Edge>>; 4],
}

impl EndpointState {
    /// An endpoint of which nothing is known yet.
    pub fn new(place: Place, transport: Transport, service: Option<(ServicePort, Arc<str>)>) -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let number = NUMBERS.fetch_add(1, Relaxed);
        Self {
            place,
            transport,
            service,
            vitals: Arc::default(),
            backend: None,
            bounds: Arc::default(),
            floor: None,
            epoch: Instant::now(),
            number,
            spoke_http2: Arc::default(),
            edges: Default::default(),
        }
    }

    /// Its number among all that there ever were.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// The time on its clock.
    pub fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// The backend that it is part of; `None` outside the mesh.
    pub fn backend(&self) -> Option<&ClusterName> {
        self.backend.as_ref()
    }

    /// How it is judged.
    pub(crate) fn detection(&self) -> Arc<Detection> {
        self.floor.as_ref().map_or_else(Arc::default, |floor| floor.detection())
    }

    /// Leaves it alone for so long, as an operator says.
    pub(crate) fn eject(&self, time: Duration) -> Result<(), NotEjected> {
        match &self.floor {
            Some(floor) => floor.eject_by_hand(&self.vitals, time, self.now()),
            None => Err(NotEjected::Gone),
        }
    }

    /// Takes it into use, and ejects it not again for so long, as an operator says.
    pub(crate) fn restore(&self, time: Duration) {
        if let Some(floor) = &self.floor {
            floor.restore_by_hand(&self.vitals, time, self.now());
        }
    }

    /// Who must answer there; `None` outside the mesh.
    pub fn identity(&self) -> Option<&SpiffeId> {
        match &self.transport {
            Transport::Sheetbend(id) | Transport::MutualTls(id) => Some(id),
            Transport::Plain => None,
        }
    }

    /// Its address, where it has one.
    pub fn socket_address(&self) -> Option<SocketAddr> {
        match &self.place {
            Place::Address(address) | Place::App(address) => Some(*address),
            Place::Name(_) => None,
        }
    }

    /// Whether a peer of ours takes its traffic in.
    pub fn is_ours(&self) -> bool {
        matches!(self.transport, Transport::Sheetbend(_))
    }

    /// The edge on which traffic to it counts. Asked of the table once a protocol, then kept.
    pub fn edge(&self, telemetry: &Telemetry, protocol: Protocol) -> &Arc<Edge> {
        let slot = match protocol {
            Protocol::Http => &self.edges[0],
            Protocol::Http2 => &self.edges[1],
            Protocol::Grpc => &self.edges[2],
            Protocol::Tcp => &self.edges[3],
        };
        slot.get_or_init(|| {
            let destination = match &self.service {
                Some((name, _)) => name.to_string().into(),
                None => "external".into(),
            };
            let peer = Peer::from(self.identity().cloned());
            let mtls = self.identity().is_some();
            telemetry.edge(EdgeKey { reporter: Reporter::Source, peer, destination, protocol, mtls })
        })
    }
}

/// All endpoints in use, and those that were until a moment ago: what is learned of one survives every new answer of the
/// control plane.
pub struct Endpoints {
    /// The start of the clock by which loads, budgets and ejections count.
    pub epoch: Instant,
    /// Where this proxy is; empty is unknown.
    pub(crate) zone: Arc<str>,
    /// Those that are asked whether they are well.
    pub(crate) checks: health::Checks,
    /// Where hosts outside the mesh are.
    pub(crate) names: names::Names,
    all: Table,
    known: Mutex<Known>,
}

impl Default for Endpoints {
    fn default() -> Self {
        Self::in_zone("".into())
    }
}

#[derive(Default)]
struct Known {
    floors: HashMap<ClusterName, Arc<Floor>>,
    bounds: HashMap<Bounded, Arc<Bounds>>,
    /// By name.
    rates: HashMap<Arc<str>, Arc<Rate>>,
    budgets: HashMap<Bounded, Arc<Budget>>,
    /// What floors decided that are gone.
    past: Tally,
    swept: Duration,
}

/// What has limits of its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Bounded {
    /// A service port of the mesh, by whichever name or address it is called.
    Service(ServicePort),
    /// What is no part of the mesh.
    Elsewhere(Target),
    /// The requests that one route takes: `default/web`.
    Route(Arc<str>),
}

impl Bounded {
    /// What is limited of it.
    pub fn limits(&self) -> &'static [Limit] {
        match self {
            Self::Service(_) | Self::Elsewhere(_) => {
                &[Limit::Connections, Limit::Pending, Limit::Requests, Limit::Retries]
            }
            Self::Route(_) => &[Limit::Route, Limit::Pending, Limit::Retries],
        }
    }
}

impl fmt::Display for Bounded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(service) => service.fmt(f),
            Self::Elsewhere(target) => target.fmt(f),
            Self::Route(route) => write!(f, "route {route}"),
        }
    }
}

impl Known {
    /// Whether it is time to look for what nobody uses any more.
    fn is_to_be_swept(&mut self, now: Duration) -> bool {
        const EVERY: Duration = Duration::from_secs(10);
        let due = now >= self.swept + EVERY;
        if due {
            self.swept = now;
        }
        due
    }

    /// Lets go of what nobody uses.
    fn sweep(&mut self) {
        self.bounds.retain(|_, bounds| Arc::strong_count(bounds) > 1);
        self.rates.retain(|_, rate| Arc::strong_count(rate) > 1);
        self.budgets.retain(|_, budget| Arc::strong_count(budget) > 1);
        let past = &mut self.past;
        self.floors.retain(|_, floor| {
            let used = Arc::strong_count(floor) > 1;
            if !used {
                *past += floor.tally();
            }
            used
        });
    }

    fn bounds(&mut self, of: Bounded) -> Arc<Bounds> {
        Arc::clone(self.bounds.entry(of).or_default())
    }

    fn budget(&mut self, of: Bounded, constraint: RetryConstraint) -> Arc<Budget> {
        let known = self.budgets.entry(of).or_default();
        if *known.constraint() != constraint {
            *known = Arc::new(Budget::new(constraint));
        }
        Arc::clone(known)
    }

    fn floor(&mut self, backend: &ClusterName) -> Arc<Floor> {
        match self.floors.get(backend) {
            Some(floor) => Arc::clone(floor),
            None => Arc::clone(self.floors.entry(backend.clone()).or_default()),
        }
    }
}

impl Endpoints {
    /// None yet, of a proxy in that zone.
    pub fn in_zone(zone: Arc<str>) -> Self {
        Self {
            epoch: Instant::now(),
            zone,
            checks: health::Checks::default(),
            names: names::Names::default(),
            all: Table::default(),
            known: Mutex::default(),
        }
    }

    /// With these DNS servers instead of those of `/etc/resolv.conf`, if there are any.
    pub(crate) fn asking(self, servers: Vec<SocketAddr>) -> Self {
        Self { names: names::Names::asking(servers), ..self }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The endpoint there, made if it is new. Asked when a destination is indexed, not for every request.
    pub fn at(
        &self,
        place: Place,
        transport: Transport,
        service: Option<(ServicePort, Arc<str>)>,
        backend: Option<&ClusterName>,
    ) -> Arc<EndpointState> {
        let key = (place.clone(), transport.clone(), backend.cloned());
        self.all.get_or_insert(key, || self.make(place, transport, service, backend))
    }

    fn make(
        &self,
        place: Place,
        transport: Transport,
        service: Option<(ServicePort, Arc<str>)>,
        backend: Option<&ClusterName>,
    ) -> EndpointState {
        let mut known = self.lock();
        let floor = backend.map(|backend| known.floor(backend));
        let bounds = match (&service, &place) {
            (Some((service, _)), _) => known.bounds(Bounded::Service(service.clone())),
            (None, Place::Name(target)) => known.bounds(Bounded::Elsewhere(target.clone())),
            (None, Place::Address(address) | Place::App(address)) => {
                known.bounds(Bounded::Elsewhere(Target::from(*address)))
            }
        };
        let new = EndpointState::new(place, transport, service);
        EndpointState { backend: backend.cloned(), bounds, floor, epoch: self.epoch, ..new }
    }

    /// Lets go of what nobody has used for a minute. Looks at everything, which takes a while: not for a request to do.
    pub(crate) fn sweep(&self) {
        let now = self.epoch.elapsed();
        if self.lock().is_to_be_swept(now) {
            self.all.sweep(now);
            self.lock().sweep();
        }
    }

    /// Those of the mesh's backends that are in use.
    pub(crate) fn of_backends(&self) -> Vec<Arc<EndpointState>> {
        let mut used = self.all.used();
        used.retain(|endpoint| endpoint.backend.is_some());
        used
    }

    /// The circuit breakers that policies ask for.
    pub(crate) fn circuits(&self, now: Duration) -> Vec<(ClusterName, Shown)> {
        let known = self.lock();
        known.floors.iter().filter_map(|(name, floor)| Some((name.clone(), floor.breaker.shown(now)?))).collect()
    }

    /// Who is ejected among a backend's endpoints.
    pub(crate) fn floor(&self, backend: &ClusterName) -> Arc<Floor> {
        self.lock().floor(backend)
    }

    /// The limits of a service port, of a route, or of what is elsewhere. Asked when a destination is indexed.
    pub fn bounds(&self, of: Bounded) -> Arc<Bounds> {
        self.lock().bounds(of)
    }

    /// The buckets of a route's rate limit. Those of one that says what it said go on as they were.
    pub(crate) fn rate(&self, wanted: &RateLimit, now: Duration) -> Arc<Rate> {
        let mut known = self.lock();
        if let Some(rate) = known.rates.get(&wanted.name).filter(|rate| rate.policy() == wanted) {
            return Arc::clone(rate);
        }
        let rate = Arc::new(Rate::new(wanted.clone(), RandomState::new(), now));
        known.rates.insert(Arc::clone(&wanted.name), Arc::clone(&rate));
        rate
    }

    /// How many retries there may be, of all workers together. Asked when a destination is indexed.
    pub(crate) fn budget(&self, of: Bounded, constraint: RetryConstraint) -> Arc<Budget> {
        self.lock().budget(of, constraint)
    }

    /// All limits of what is in use.
    pub(crate) fn all_bounds(&self) -> Vec<(Bounded, Arc<Bounds>)> {
        let known = self.lock();
        let used = known.bounds.iter().filter(|(_, bounds)| Arc::strong_count(bounds) > 1);
        used.map(|(of, bounds)| (of.clone(), Arc::clone(bounds))).collect()
    }

    /// What was decided about ejections so far.
    pub(crate) fn tally(&self) -> Tally {
        let known = self.lock();
        let mut all = known.past;
        known.floors.values().for_each(|floor| all += floor.tally());
        all
    }
}
