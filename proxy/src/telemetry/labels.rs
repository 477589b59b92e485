//! Istio's labels of an edge, and of a request on it.

use sheetbend_certs::SpiffeId;

use super::series::Labels;
use super::{EdgeKey, Flags, Peer, Protocol, Reporter};

const UNKNOWN: &str = "unknown";

/// `reporter` as Istio writes it.
pub(super) fn reporter(reporter: Reporter) -> &'static str {
    match reporter {
        Reporter::Source => "source",
        Reporter::Destination => "destination",
    }
}

/// The labels that every series of this edge has. Two ports of a service share them: Istio has no label for a port.
pub(super) fn of_edge(key: &EdgeKey, own: &SpiffeId) -> Labels {
    let peer = match &key.peer {
        Peer::Known(id) => Some(id),
        Peer::Unknown => None,
    };
    let (source, destination) = match key.reporter {
        Reporter::Source => (Some(own), peer),
        Reporter::Destination => (peer, Some(own)),
    };
    let (service, namespace) = service_of(&key.destination);
    let full = match namespace {
        UNKNOWN => service.to_string(),
        namespace => format!("{service}.{namespace}.svc.cluster.local"),
    };
    let mut labels: Labels = vec![("reporter", reporter(key.reporter).to_string())];
    labels.extend(workload(
        [
            "source_workload",
            "source_canonical_service",
            "source_app",
            "source_workload_namespace",
            "source_principal",
            "source_version",
            "source_canonical_revision",
            "source_cluster",
        ],
        source,
    ));
    labels.extend(workload(
        [
            "destination_workload",
            "destination_canonical_service",
            "destination_app",
            "destination_workload_namespace",
            "destination_principal",
            "destination_version",
            "destination_canonical_revision",
            "destination_cluster",
        ],
        destination,
    ));
    let protocol = match key.protocol {
        Protocol::Http | Protocol::Http2 => "http",
        Protocol::Grpc => "grpc",
        Protocol::Tcp => "tcp",
    };
    let security = if key.mtls { "mutual_tls" } else { "none" };
    labels.extend([
        ("destination_service", full),
        ("destination_service_name", service.to_string()),
        ("destination_service_namespace", namespace.to_string()),
        ("request_protocol", protocol.to_string()),
        ("connection_security_policy", security.to_string()),
    ]);
    labels
}

fn workload(names: [&'static str; 8], id: Option<&SpiffeId>) -> Labels {
    let (namespace, account) = id.and_then(SpiffeId::workload).unwrap_or((UNKNOWN, UNKNOWN));
    let principal = id.map_or(UNKNOWN, SpiffeId::as_str);
    let revision = if id.is_some() { "latest" } else { UNKNOWN };
    let values = [account, account, account, namespace, principal, UNKNOWN, revision, UNKNOWN];
    names.into_iter().zip(values.map(str::to_string)).collect()
}

/// `web.default:8000` → (`web`, `default`); what is outside has Istio's word for it.
fn service_of(destination: &str) -> (&str, &str) {
    let name = destination.rsplit_once(':').map_or(destination, |(name, _)| name);
    match name.rsplit_once('.') {
        Some(parts) => parts,
        None if name == "external" => ("PassthroughCluster", UNKNOWN),
        None => (name, UNKNOWN),
    }
}

/// What tells a request's series from others of its edge, in one word: never zero.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Code(pub(super) u64);

impl Code {
    /// 32 bits of flags, 10 of status, 5 of gRPC status + 1; the top bit is always set. Statuses beyond 599 and gRPC codes that
    /// do not exist are peers' inventions: 0, and UNKNOWN as gRPC's specification asks.
    pub(super) fn new(status: u16, grpc: Option<u16>, flags: Flags) -> Self {
        let status = if (100..600).contains(&status) { u64::from(status) } else { 0 };
        let grpc = grpc.map_or(0, |code| if code > 16 { 2 } else { u64::from(code) } + 1);
        Self(1 << 63 | grpc << 42 | status << 32 | u64::from(flags.bits()))
    }

    /// Its labels.
    pub(super) fn labels(self, flags: Flags) -> Labels {
        let grpc = self.0 >> 42 & 0x1f;
        vec![
            ("response_code", (self.0 >> 32 & 0x3ff).to_string()),
            ("grpc_response_status", grpc.checked_sub(1).map_or_else(String::new, |code| code.to_string())),
            ("response_flags", flags.to_string()),
        ]
    }
}
