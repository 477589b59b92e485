//! Hosts outside the mesh that services stand for: what DNS says of them for as long as it says, and for longer while it
//! says nothing.
//!
//! A host is looked up when somebody wants it, and again when what is known is over: whoever comes then goes on with what was
//! known, and the next ones with what is new. Only who comes first, or after a long silence, waits.

use std::collections::HashMap;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{LookupIpStrategy, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use sheetbend_control_plane_client::discovery::Discovery;
use sheetbend_control_plane_client::model::{
    Cluster, ClusterName, Destination, Endpoint, Resolution, Standing, Target, Transport,
};
use tokio::time::timeout;

use crate::telemetry::{Counter, Telemetry};

/// An answer holds for so long, whatever shorter time it names: one with a TTL of 0 would be asked for with every request.
const FLOOR: Duration = Duration::from_secs(1);
/// An answer holds for no longer, whatever longer time it names.
const CEILING: Duration = Duration::from_secs(300);
/// After a failure it is asked again after `FLOOR`, then after twice as long each time, and after so long at most.
const PATIENCE: Duration = Duration::from_secs(30);
/// Who needs an answer waits for so long: two attempts of 2 s, and some.
const FIRST: Duration = Duration::from_secs(5);
/// What was over for longer is asked for again before it is used, which waits for so long.
const LONG_AGO: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(1));
/// Addresses of one name that are used.
const MOST_ADDRESSES: usize = 256;

/// What is known of hosts, for all workers together.
#[derive(Default)]
pub(crate) struct Names {
    /// Asked instead of those of `/etc/resolv.conf`.
    servers: Arc<[SocketAddr]>,
    known: Mutex<HashMap<Target, Arc<Name>>>,
    filled: Mutex<HashMap<ClusterName, Filled>>,
}

/// What is known of one host.
pub(crate) struct Name {
    host: Target,
    answer: ArcSwapOption<Answer>,
    /// Held by who asks.
    asking: Arc<tokio::sync::Mutex<()>>,
}

/// Hosts, each with its addresses of some moment.
pub(crate) type Hosts = Box<[(Arc<Name>, Arc<[SocketAddr]>)]>;

/// Where a host is. PURE.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Answer {
    /// In order. Of an answer that says what was known, this is the one that was known.
    addresses: Arc<[SocketAddr]>,
    until: Instant,
    /// How often in a row there was none since.
    failures: u32,
}

/// A cluster with its host's addresses among its endpoints.
struct Filled {
    of: Arc<Cluster>,
    addresses: Arc<[SocketAddr]>,
    cluster: Arc<Cluster>,
}

impl Answer {
    /// What holds after a look-up that found these, until then; or nothing.
    fn after(old: Option<&Self>, found: Option<(Vec<SocketAddr>, Instant)>, now: Instant) -> Self {
        let known = old.map(|old| Arc::clone(&old.addresses)).unwrap_or_default();
        let Some((mut found, until)) = found else {
            let failures = old.map_or(0, |old| old.failures).saturating_add(1);
            let wait = FLOOR.saturating_mul(1 << (failures - 1).min(16)).min(PATIENCE);
            return Self { addresses: known, until: now + wait, failures };
        };
        found.sort_unstable();
        found.dedup();
        found.truncate(MOST_ADDRESSES);
        let addresses = if *known == *found { known } else { found.into() };
        Self { addresses, until: until.clamp(now + FLOOR, now + CEILING), failures: 0 }
    }
}

impl Name {
    /// The host's name.
    pub(crate) fn host(&self) -> &str {
        self.host.host()
    }

    /// Whether these are its addresses, as far as anybody knows.
    pub(crate) fn is_at(&self, addresses: &Arc<[SocketAddr]>) -> bool {
        match self.answer.load().as_ref() {
            Some(answer) => {
                Arc::ptr_eq(&answer.addresses, addresses) || answer.addresses.is_empty() && addresses.is_empty()
            }
            None => addresses.is_empty(),
        }
    }

    /// Whether it is time to ask for it.
    pub(crate) fn is_over(&self) -> bool {
        self.answer.load().as_ref().is_none_or(|answer| Instant::now() >= answer.until)
    }

    /// Asks, unless somebody else did meanwhile.
    async fn ask(self: Arc<Self>, servers: Arc<[SocketAddr]>, discovery: Discovery, telemetry: Arc<Telemetry>) {
        let _asking = self.asking.lock().await;
        if !self.is_over() {
            return;
        }
        let found = match timeout(FIRST, resolve(&servers, &self.host)).await {
            Ok(Ok((addresses, until))) => Ok((outside(addresses, &self.host, &discovery, &telemetry).await, until)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(format!("no answer within {} s", FIRST.as_secs())),
        };
        let found = found.and_then(|(addresses, until)| match addresses.is_empty() {
            true => Err("it has no address outside the mesh".to_string()),
            false => Ok((addresses, until)),
        });
        let old = self.answer.load_full();
        telemetry.count(if found.is_ok() { Counter::LookedUp } else { Counter::NotLookedUp });
        if let Err(why) = &found
            && let Some(left_out) = telemetry.sparingly("a name is not found")
        {
            let (host, known) = (&self.host, old.as_ref().map_or(0, |old| old.addresses.len()));
            tracing::warn!(%host, why, known, left_out, "a name is not found: what was known of it stays");
        }
        let answer = Answer::after(old.as_deref(), found.ok(), Instant::now());
        if old.is_none_or(|old| !Arc::ptr_eq(&old.addresses, &answer.addresses)) {
            tracing::info!(host = %self.host, addresses = ?answer.addresses, "a name leads elsewhere");
        }
        self.answer.store(Some(Arc::new(answer)));
    }
}

impl Names {
    /// `servers` are asked instead of those of `/etc/resolv.conf`, if there are any.
    pub(crate) fn asking(servers: Vec<SocketAddr>) -> Self {
        Self { servers: servers.into(), ..Self::default() }
    }

    fn name(&self, host: &Target) -> Arc<Name> {
        let mut known = lock(&self.known);
        if let Some(name) = known.get(host) {
            return Arc::clone(name);
        }
        let new = Arc::new(Name { host: host.clone(), answer: ArcSwapOption::empty(), asking: Arc::default() });
        known.insert(host.clone(), Arc::clone(&new));
        new
    }

    /// Sees to it that something is known of a destination's hosts, and that it is asked again for what is over.
    pub(crate) async fn look_up(&self, destination: &Destination, discovery: &Discovery, telemetry: &Arc<Telemetry>) {
        for host in destination.clusters.values().filter_map(|cluster| cluster.external.as_ref()) {
            let name = self.name(host);
            let known = name.answer.load().as_ref().map(|answer| answer.until);
            let over = known.map(|until| Instant::now().saturating_duration_since(until));
            if known.is_some() && (over == Some(Duration::ZERO) || name.asking.try_lock().is_err()) {
                continue;
            }
            // Apart from who waits for it: one who goes away ends nobody else's wait.
            let asking = tokio::spawn(Arc::clone(&name).ask(
                Arc::clone(&self.servers),
                discovery.clone(),
                Arc::clone(telemetry),
            ));
            let wait = match over {
                None => FIRST,
                Some(over) if over > LONG_AGO.0 => LONG_AGO.1,
                Some(_) => continue,
            };
            // However it ends: what is known is used.
            let _ = timeout(wait, asking).await;
        }
    }

    /// The hosts of a destination, and where they are.
    pub(crate) fn of(&self, destination: &Destination) -> Hosts {
        let hosts = destination.clusters.values().filter_map(|cluster| cluster.external.as_ref());
        let each = hosts.map(|host| {
            let name = self.name(host);
            let addresses = name.answer.load().as_ref().map(|answer| Arc::clone(&answer.addresses)).unwrap_or_default();
            (name, addresses)
        });
        each.collect()
    }

    /// A cluster with its host's addresses among its endpoints; the same one for as long as those are the same.
    pub(crate) fn fill(&self, cluster: &Arc<Cluster>) -> Arc<Cluster> {
        let Some(host) = &cluster.external else { return Arc::clone(cluster) };
        let name = self.name(host);
        let addresses = name.answer.load().as_ref().map(|answer| Arc::clone(&answer.addresses)).unwrap_or_default();
        let mut filled = lock(&self.filled);
        let same = |known: &&Filled| Arc::ptr_eq(&known.of, cluster) && known.addresses == addresses;
        if let Some(known) = filled.get(&cluster.name).filter(same) {
            return Arc::clone(&known.cluster);
        }
        let endpoint = |address: &SocketAddr| Endpoint {
            address: *address,
            transport: Transport::Plain,
            standing: Standing::default(),
            workload: host.host().into(),
        };
        let mut whole = Cluster::clone(cluster);
        let new = addresses.iter().filter(|address| !cluster.endpoints.iter().any(|known| known.address == **address));
        whole.endpoints.extend(new.map(endpoint));
        let whole = Arc::new(whole);
        let known = Filled { of: Arc::clone(cluster), addresses, cluster: Arc::clone(&whole) };
        filled.insert(cluster.name.clone(), known);
        whole
    }

    /// Whether a cluster is filled with the newest addresses.
    pub(crate) fn is_current(&self, filled: &Arc<Cluster>) -> bool {
        filled.external.is_none()
            || lock(&self.filled).get(&filled.name).is_some_and(|known| Arc::ptr_eq(&known.cluster, filled))
    }
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Names").field("servers", &self.servers).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Those that are not the mesh's: what is meshed is never called in plain, by whatever name.
async fn outside(
    addresses: Vec<SocketAddr>,
    host: &Target,
    discovery: &Discovery,
    telemetry: &Telemetry,
) -> Vec<SocketAddr> {
    let (mut outside, mut inside) = (Vec::new(), Vec::new());
    for address in addresses.into_iter().take(MOST_ADDRESSES) {
        let target = Target::from(address);
        let of_mesh = discovery.snapshot().claims(&target)
            && !matches!(discovery.resolve(&target).await, Ok(Resolution::NotMesh));
        if of_mesh { &mut inside } else { &mut outside }.push(address);
    }
    if let Some(first) = inside.first()
        && let Some(left_out) = telemetry.sparingly("a name leads into the mesh")
    {
        let addresses = inside.len();
        tracing::warn!(%host, %first, addresses, left_out, "a name leads into the mesh, where nothing is called in plain");
    }
    outside
}

/// Looks a host up as the system would: `/etc/hosts`, `/etc/resolv.conf`, IPv4 and IPv6. Both files are read anew each time:
/// a laptop's change with its network.
async fn resolve(servers: &[SocketAddr], host: &Target) -> Result<(Vec<SocketAddr>, Instant), String> {
    let mut builder = match servers.is_empty() {
        true => TokioResolver::builder_tokio().map_err(|error| error.to_string())?,
        false => TokioResolver::builder_with_config(asking(servers), TokioRuntimeProvider::default()),
    };
    let options = builder.options_mut();
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    (options.timeout, options.attempts, options.cache_size) = (Duration::from_secs(2), 2, 4);
    let resolver = builder.build().map_err(|error| error.to_string())?;
    // A host with a dot is whole: no search domain is tried for it, as for a CNAME.
    let name = if host.host().contains('.') { format!("{}.", host.host()) } else { host.host().to_string() };
    let found = resolver.lookup_ip(name).await.map_err(|error| error.to_string())?;
    let all: Vec<SocketAddr> = found.iter().map(|ip| SocketAddr::new(ip.to_canonical(), host.port())).collect();
    // RFC 6724 §6, rule 1: destinations that cannot be reached come last. Here: not at all, if there are others.
    let reachable: Vec<SocketAddr> = all.iter().copied().filter(|address| has_way(*address)).collect();
    Ok((if reachable.is_empty() { all } else { reachable }, found.valid_until()))
}

fn asking(servers: &[SocketAddr]) -> ResolverConfig {
    let server = |address: &SocketAddr| {
        let mut server = NameServerConfig::udp_and_tcp(address.ip());
        server.connections.iter_mut().for_each(|connection| connection.port = address.port());
        server
    };
    ResolverConfig::from_name_servers(servers.iter().map(server).collect())
}

/// Whether there is a way to an address from here. Nothing is sent: connecting a datagram socket only looks the way up.
fn has_way(address: SocketAddr) -> bool {
    let any = match address {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    UdpSocket::bind(any).and_then(|socket| socket.connect(address)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(last: u8) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, last], 443))
    }

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn an_answer_holds_for_its_ttl_within_bounds() {
        let now = Instant::now();
        for (ttl, holds) in [(0, 1), (1, 1), (60, 60), (86_400, 300)] {
            let answer = Answer::after(None, Some((vec![at(1)], now + seconds(ttl))), now);
            assert_eq!(answer.until, now + seconds(holds), "a TTL of {ttl} s");
        }
    }

    #[test]
    fn the_last_good_answer_stays_while_there_is_none_and_is_asked_for_less_and_less() {
        let now = Instant::now();
        let good = Answer::after(None, Some((vec![at(2), at(1), at(2)], now)), now);
        assert_eq!(*good.addresses, [at(1), at(2)]);
        let mut answer = good.clone();
        for wait in [1, 2, 4, 8, 16, 30, 30] {
            answer = Answer::after(Some(&answer), None, now);
            assert!(Arc::ptr_eq(&answer.addresses, &good.addresses));
            assert_eq!(answer.until, now + seconds(wait));
        }
        let again = Answer::after(Some(&answer), Some((vec![at(1), at(2)], now)), now);
        assert!(Arc::ptr_eq(&again.addresses, &good.addresses), "what is the same stays one value");
        assert_eq!(again.failures, 0);
        let moved = Answer::after(Some(&again), Some((vec![at(3)], now)), now);
        assert_eq!(*moved.addresses, [at(3)]);
    }

    #[test]
    fn that_nobody_knows_a_name_is_remembered_briefly() {
        let now = Instant::now();
        let answer = Answer::after(None, None, now);
        assert!(answer.addresses.is_empty());
        assert_eq!(answer.until, now + FLOOR);
    }

    #[test]
    fn a_cluster_is_filled_once_an_answer_and_keeps_its_own_endpoints() {
        let names = Names::default();
        let cluster: Cluster = serde_json::from_value(serde_json::json!({
            "name": "api.default:443",
            "service": {"service": {"service": "api", "namespace": "default"}, "port": 443},
            "endpoints": [{"address": "127.0.0.1:443", "transport": "plain"}],
            "external": "api.example.com:443",
        }))
        .unwrap();
        let cluster = Arc::new(cluster);
        let host = names.name(cluster.external.as_ref().unwrap());
        let say = |all: Vec<SocketAddr>| {
            let now = Instant::now();
            let answer = Answer::after(host.answer.load().as_deref(), Some((all, now)), now);
            host.answer.store(Some(answer.into()));
        };
        say(vec![at(1), at(2)]);
        let first = names.fill(&cluster);
        let addresses = |cluster: &Cluster| cluster.endpoints.iter().map(|e| e.address).collect::<Vec<_>>();
        assert_eq!(addresses(&first), [at(1), at(2)]);
        say(vec![at(2), at(1)]);
        assert!(Arc::ptr_eq(&first, &names.fill(&cluster)) && names.is_current(&first));
        say(vec![at(3)]);
        let second = names.fill(&cluster);
        assert_eq!(addresses(&second), [at(1), at(3)]);
        assert!(names.is_current(&second) && !names.is_current(&first));
    }
}
