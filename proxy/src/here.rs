//! What leads to this proxy itself: listeners of its own, to which nothing may be sent that would only come back, and
//! the app beside it, which others reach by an address of ours.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use sheetbend_control_plane_client::model::AppProtocol;

use crate::inbound::Port;

/// Where this proxy and its app are reached.
pub(crate) struct Here {
    /// Listeners that lead to no port of the app.
    pub(crate) listeners: Vec<SocketAddr>,
    /// The address by which others reach this proxy; it need not be one of this machine's.
    pub(crate) advertise: IpAddr,
    /// Listeners for one port of the app each.
    pub(crate) ports: Vec<(SocketAddr, Arc<Port>)>,
    /// What the kernel redirects to us.
    pub(crate) redirected: Option<Redirected>,
    /// What the ports are called that callers mean.
    pub(crate) names: Arc<PortNames>,
}

/// What the ports of the service beside this proxy are called where traffic is counted. Callers may mean any port: past so
/// many, the others share one name, so that nobody fills with them what is there for everybody's.
pub(crate) struct PortNames {
    /// `web.default`.
    service: String,
    known: Mutex<HashMap<u16, Arc<str>>>,
    most: usize,
}

/// Ports with a name of their own that nobody declared.
const MOST_NAMED: usize = 64;

impl PortNames {
    /// Those that are `declared` have one of their own.
    pub(crate) fn new(service: String, declared: impl IntoIterator<Item = u16>) -> Self {
        let name = |port| (port, format!("{service}:{port}").into());
        let known: HashMap<_, _> = declared.into_iter().map(name).collect();
        Self { most: known.len() + MOST_NAMED, service, known: Mutex::new(known) }
    }

    /// Of a port that a caller means. Asked once a connection.
    pub(crate) fn of(&self, port: u16) -> Arc<str> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= self.most && !known.contains_key(&port) {
            return format!("{}:other", self.service).into();
        }
        Arc::clone(known.entry(port).or_insert_with(|| format!("{}:{port}", self.service).into()))
    }

    /// The service port that a peer of ours named (`80.web.default.cluster.local`), so that both ends name the edge alike: a
    /// service's port need not be the app's. Only of this service, which a peer cannot make up.
    pub(crate) fn called(&self, name: &str, trust_domain: &str) -> Option<Arc<str>> {
        let (port, rest) = name.split_once('.')?;
        let port: u16 = port.parse().ok()?;
        (rest.strip_suffix(trust_domain)?.strip_suffix('.')? == self.service).then(|| self.of(port))
    }
}

impl Here {
    /// Whether a connection to `address` would come in on a listener that leads to no app.
    pub(crate) fn is_listener(&self, address: SocketAddr) -> bool {
        self.listeners.iter().any(|listener| self.reaches(*listener, address))
    }

    /// The port of the app that a peer reaches at `address`, if that is an address of ours.
    pub(crate) fn port_at(&self, address: SocketAddr) -> Option<Arc<Port>> {
        if let Some((_, port)) = self.ports.iter().find(|(listener, _)| self.reaches(*listener, address)) {
            return Some(Arc::clone(port));
        }
        let redirected = self.redirected.as_ref().filter(|_| self.is_ours(address.ip()))?;
        redirected.port_at(address).filter(|_| !self.is_listener(address))
    }

    /// The port asked for first, since an answer about addresses costs system calls and is seldom needed.
    fn reaches(&self, listener: SocketAddr, address: SocketAddr) -> bool {
        listener.port() == address.port()
            && (listener.ip() == address.ip() || (listener.ip().is_unspecified() && self.is_ours(address.ip())))
    }

    fn is_ours(&self, ip: IpAddr) -> bool {
        let of_an_interface = |interfaces: Vec<if_addrs::Interface>| interfaces.iter().any(|found| found.ip() == ip);
        ip.is_loopback()
            || ip.is_unspecified()
            || ip == self.advertise
            || if_addrs::get_if_addrs().is_ok_and(of_an_interface)
    }
}

/// The ports of an app whose connections the kernel redirects: they all come in on one listener.
pub(crate) struct Redirected {
    names: Arc<PortNames>,
    /// What the app speaks, as far as someone said so.
    protocols: HashMap<u16, AppProtocol>,
    /// Those that were asked for, kept so that connections to the app can be kept. Looked at once a connection.
    known: Mutex<HashMap<SocketAddr, Arc<Port>>>,
}

/// More destinations than an app has; past these, those known are forgotten.
const MOST: usize = 1024;

impl Redirected {
    pub(crate) fn new(names: Arc<PortNames>, protocols: HashMap<u16, AppProtocol>) -> Self {
        Self { names, protocols, known: Mutex::default() }
    }

    /// The port that a connection was on its way to. The app is dialed just there: one that is bound to the pod's address
    /// works, and one bound to loopback stays private. `None` for an address that no other host can mean.
    pub(crate) fn port_at(&self, original: SocketAddr) -> Option<Arc<Port>> {
        if original.ip().is_loopback() || original.ip().is_unspecified() {
            return None;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(port) = known.get(&original) {
            return Some(Arc::clone(port));
        }
        let port = Arc::new(Port {
            port: original.port(),
            mesh_tls: false,
            protocol: self.protocols.get(&original.port()).copied().unwrap_or_default(),
            name: self.names.of(original.port()),
            app: ArcSwap::new(Port::app_at(original)),
        });
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(original, Arc::clone(&port));
        Some(port)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn here(listeners: &[&str]) -> Here {
        let names = Arc::new(PortNames::new("web.default".into(), []));
        Here {
            listeners: listeners.iter().map(|text| text.parse().unwrap()).collect(),
            advertise: [192, 0, 2, 7].into(),
            ports: Vec::new(),
            redirected: Some(Redirected::new(Arc::clone(&names), HashMap::new())),
            names,
        }
    }

    #[test]
    fn a_wildcard_listener_is_reached_by_every_address_of_ours_and_by_no_other() {
        let here = here(&["[::]:15106", "127.0.0.1:15100"]);
        for own in ["127.0.0.1:15106", "127.9.9.9:15106", "[::1]:15106", "192.0.2.7:15106", "127.0.0.1:15100"] {
            assert!(here.is_listener(own.parse().unwrap()), "{own}");
        }
        for other in ["198.51.100.9:15106", "192.0.2.7:15107", "192.0.2.7:15100"] {
            assert!(!here.is_listener(other.parse().unwrap()), "{other}");
        }
    }

    #[test]
    fn the_app_is_where_its_callers_meant_and_never_a_listener_of_ours() {
        let here = here(&["[::]:15106"]);
        let port = here.port_at("192.0.2.7:8000".parse().unwrap()).unwrap();
        assert_eq!(&*port.name, "web.default:8000");
        assert_eq!(port.app.load().socket_address(), Some("192.0.2.7:8000".parse().unwrap()));
        for nobody in ["192.0.2.7:15106", "127.0.0.1:8000", "[::1]:8000", "198.51.100.9:8000"] {
            assert!(here.port_at(nobody.parse().unwrap()).is_none(), "{nobody}");
        }
    }

    #[test]
    fn a_peer_names_the_port_it_called_and_no_other_service() {
        let names = PortNames::new("web.default".into(), []);
        let called = |name| names.called(name, "cluster.local");
        assert_eq!(called("80.web.default.cluster.local").as_deref(), Some("web.default:80"));
        for other in ["80.db.default.cluster.local", "80.web.default.other", "x.web.default.cluster.local", "web", ""] {
            assert_eq!(called(other), None, "{other}");
        }
    }

    #[test]
    fn whoever_means_every_port_makes_few_names_and_takes_none_from_others() {
        let names = PortNames::new("web.default".into(), [60_000]);
        assert_eq!(&*names.of(80), "web.default:80");
        let all: HashSet<_> = (1..u16::MAX).map(|port| names.of(port)).collect();
        assert_eq!(all.len(), 1 + MOST_NAMED + 1);
        assert_eq!(&*names.of(80), "web.default:80");
        assert_eq!(&*names.of(60_000), "web.default:60000", "which somebody declared");
        assert_eq!(&*names.of(50_000), "web.default:other");
    }

    #[test]
    fn who_means_the_same_address_meets_the_same_app() {
        let here = here(&[]);
        let app = |text: &str| here.port_at(text.parse().unwrap()).unwrap();
        assert!(Arc::ptr_eq(&app("192.0.2.7:8000"), &app("192.0.2.7:8000")));
        assert!(!Arc::ptr_eq(&app("192.0.2.7:8000"), &app("192.0.2.7:8001")));
    }
}
