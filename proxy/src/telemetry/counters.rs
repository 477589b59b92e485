//! What the proxy counts about itself: everything that has no name in Istio's metrics.

use metrics::{Key, Label, Level, Metadata, Recorder};

use crate::traffic::limit::Limit;

macro_rules! metrics_of_the_process {
    ($(#[$doc:meta])* $type:ident; $($variant:ident $name:literal { $($label:ident: $value:literal),* } $help:literal;)+) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $type {
            $(#[doc = concat!("`", $name, "{", $(stringify!($label), "=", $value,)* "}`: ", $help)] $variant,)+
        }

        impl $type {
            pub(super) const ALL: &'static [Self] = &[$(Self::$variant,)+];

            fn describe(self) -> (&'static str, &'static str, &'static [(&'static str, &'static str)]) {
                match self { $(Self::$variant => ($name, $help, &[$((stringify!($label), $value)),*]),)+ }
            }
        }
    };
}

metrics_of_the_process! {
    /// A count of events in this process. Every one is there from the start, at zero.
    Counter;
    DetectedHttp1 "sheetbend_detected_total" { protocol: "http1" } "Connections by what their first bytes were.";
    DetectedHttp2 "sheetbend_detected_total" { protocol: "http2" } "Connections by what their first bytes were.";
    DetectedTls "sheetbend_detected_total" { protocol: "tls" } "Connections by what their first bytes were.";
    DetectedOpaque "sheetbend_detected_total" { protocol: "opaque" } "Connections by what their first bytes were.";
    DetectedSilent "sheetbend_detected_total" { protocol: "silent" } "Connections by what their first bytes were.";

    RetriedConnect "sheetbend_retries_total" { reason: "connect" } "Attempts after the first, by why the one before failed.";
    RetriedUnsent "sheetbend_retries_total" { reason: "unsent" } "Attempts after the first, by why the one before failed.";
    RetriedRefused "sheetbend_retries_total" { reason: "refused_stream" } "Attempts after the first, by why the one before failed.";
    RetriedGoAway "sheetbend_retries_total" { reason: "goaway" } "Attempts after the first, by why the one before failed.";
    RetriedPeerConnect "sheetbend_retries_total" { reason: "peer_connect" } "Attempts after the first, by why the one before failed.";
    RetriedShed "sheetbend_retries_total" { reason: "shed" } "Attempts after the first, by why the one before failed.";
    RetriedReset "sheetbend_retries_total" { reason: "reset" } "Attempts after the first, by why the one before failed.";
    RetriedTimeout "sheetbend_retries_total" { reason: "per_try_timeout" } "Attempts after the first, by why the one before failed.";
    RetriedStatus "sheetbend_retries_total" { reason: "status" } "Attempts after the first, by why the one before failed.";
    RetriedGrpc "sheetbend_retries_total" { reason: "grpc_status" } "Attempts after the first, by why the one before failed.";

    EjectedErrors "sheetbend_ejections_total" { reason: "consecutive_failures" } "Endpoints left alone for a while, by why.";
    EjectedGatewayErrors "sheetbend_ejections_total" { reason: "consecutive_gateway_errors" } "Endpoints left alone for a while, by why.";
    EjectedLocalFailures "sheetbend_ejections_total" { reason: "consecutive_local_origin_failures" } "Endpoints left alone for a while, by why.";
    EjectedSuccessRate "sheetbend_ejections_total" { reason: "success_rate" } "Endpoints left alone for a while, by why.";
    EjectedDeviation "sheetbend_ejections_total" { reason: "success_rate_deviation" } "Endpoints left alone for a while, by why.";
    EjectedFailureShare "sheetbend_ejections_total" { reason: "failure_percentage" } "Endpoints left alone for a while, by why.";
    EjectedProbe "sheetbend_ejections_total" { reason: "probe_failed" } "Endpoints left alone for a while, by why.";
    EjectedHealthCheck "sheetbend_ejections_total" { reason: "health_check" } "Endpoints left alone for a while, by why.";
    EjectedOperator "sheetbend_ejections_total" { reason: "operator" } "Endpoints left alone for a while, by why.";
    CircuitRejected "sheetbend_circuit_rejected_total" {} "Requests answered at once, since the circuit breaker of their destination is open.";
    CircuitOpened "sheetbend_circuit_opened_total" {} "How often circuit breakers of destinations have opened.";
    NotEjectedFloor "sheetbend_not_ejected_total" { reason: "floor" } "Endpoints that failed and were kept, by why.";
    NotEjectedCommonCause "sheetbend_not_ejected_total" { reason: "common_cause" } "Endpoints that failed and were kept, by why.";
    NotRetriedUnsafe "sheetbend_not_retried_total" { reason: "unsafe" } "Failures that were not tried again, by why not.";
    NotRetriedBody "sheetbend_not_retried_total" { reason: "body_too_large" } "Failures that were not tried again, by why not.";
    NotRetriedBudget "sheetbend_not_retried_total" { reason: "budget" } "Failures that were not tried again, by why not.";
    NotRetriedAttempts "sheetbend_not_retried_total" { reason: "attempts" } "Failures that were not tried again, by why not.";
    NotRetriedDeadline "sheetbend_not_retried_total" { reason: "deadline" } "Failures that were not tried again, by why not.";
    NotRetriedPolicy "sheetbend_not_retried_total" { reason: "not_asked_for" } "Failures that were not tried again, by why not.";
    NotRetriedCaller "sheetbend_not_retried_total" { reason: "caller_retries" } "Failures that were not tried again, by why not.";
    NotRetriedInVain "sheetbend_not_retried_total" { reason: "retried_further_on" } "Failures that were not tried again, by why not.";
    NotRetriedLimit "sheetbend_not_retried_total" { reason: "max_retries" } "Failures that were not tried again, by why not.";
    NotRetriedBegun "sheetbend_not_retried_total" { reason: "answer_begun" } "Failures that were not tried again, by why not.";
    NotRetriedRefused "sheetbend_not_retried_total" { reason: "refused_here" } "Failures that were not tried again, by why not.";

    TimeoutConnect "sheetbend_timeouts_total" { timer: "connect" } "What took too long, by which timer ended it.";
    TimeoutRequest "sheetbend_timeouts_total" { timer: "request" } "What took too long, by which timer ended it.";
    TimeoutCaller "sheetbend_timeouts_total" { timer: "callers_deadline" } "What took too long, by which timer ended it.";
    TimeoutPerTry "sheetbend_timeouts_total" { timer: "per_try" } "What took too long, by which timer ended it.";
    TimeoutStreamIdle "sheetbend_timeouts_total" { timer: "stream_idle" } "What took too long, by which timer ended it.";
    TimeoutTcpIdle "sheetbend_timeouts_total" { timer: "tcp_idle" } "What took too long, by which timer ended it.";

    AccessAudited "sheetbend_authorization_audited_total" {} "Calls that a policy with action AUDIT matched.";
    DryRunAllowed "sheetbend_authorization_dry_run_total" { result: "allowed" } "Calls by what would have been if policies that run dry were obeyed.";
    DryRunDenied "sheetbend_authorization_dry_run_total" { result: "denied" } "Calls by what would have been if policies that run dry were obeyed.";
    RefusedNoCertificate "sheetbend_refused_total" { reason: "no_certificate" } "Connections and requests refused, by why.";
    RefusedCertificate "sheetbend_refused_total" { reason: "certificate" } "Connections and requests refused, by why.";
    RefusedIdentity "sheetbend_refused_total" { reason: "identity" } "Connections and requests refused, by why.";
    RefusedNotAllowed "sheetbend_refused_total" { reason: "not_allowed" } "Connections and requests refused, by why.";
    RefusedAuthorization "sheetbend_refused_total" { reason: "authorization_policy" } "Connections and requests refused, by why.";
    RefusedToken "sheetbend_refused_total" { reason: "token" } "Connections and requests refused, by why.";
    RefusedPlain "sheetbend_refused_total" { reason: "plain" } "Connections and requests refused, by why.";
    RefusedOpaque "sheetbend_refused_total" { reason: "opaque" } "Connections and requests refused, by why.";
    RefusedTlsVersion "sheetbend_refused_total" { reason: "tls_version" } "Connections and requests refused, by why.";
    RefusedHandshake "sheetbend_refused_total" { reason: "handshake" } "Connections and requests refused, by why.";
    RefusedHandshakeTimeout "sheetbend_refused_total" { reason: "handshake_timeout" } "Connections and requests refused, by why.";
    RefusedOwner "sheetbend_refused_total" { reason: "other_user" } "Connections and requests refused, by why.";
    RefusedPolicy "sheetbend_refused_total" { reason: "outbound_policy" } "Connections and requests refused, by why.";
    RefusedNoIdentity "sheetbend_refused_total" { reason: "no_own_certificate" } "Connections and requests refused, by why.";
    RefusedLoop "sheetbend_refused_total" { reason: "loop" } "Connections and requests refused, by why.";
    RefusedNotRedirected "sheetbend_refused_total" { reason: "not_redirected" } "Connections and requests refused, by why.";
    RefusedNoRoute "sheetbend_refused_total" { reason: "no_route" } "Connections and requests refused, by why.";
    RefusedOverload "sheetbend_refused_total" { reason: "overload" } "Connections and requests refused, by why.";

    AmbiguousRequest "sheetbend_rejected_requests_total" { reason: "ambiguous" } "Requests this proxy answered itself, by why.";
    MalformedRequest "sheetbend_rejected_requests_total" { reason: "malformed" } "Requests this proxy answered itself, by why.";
    HeadersTooLarge "sheetbend_rejected_requests_total" { reason: "headers_too_large" } "Requests this proxy answered itself, by why.";
    HeadersTooSlow "sheetbend_rejected_requests_total" { reason: "headers_too_slow" } "Requests this proxy answered itself, by why.";
    Smuggling "sheetbend_rejected_requests_total" { reason: "smuggling" } "Requests this proxy answered itself, by why.";
    RejectedNoEndpoint "sheetbend_rejected_requests_total" { reason: "no_endpoint" } "Requests this proxy answered itself, by why.";
    RejectedNoDiscovery "sheetbend_rejected_requests_total" { reason: "no_discovery" } "Requests this proxy answered itself, by why.";

    RejectedNotHttp2 "sheetbend_rejected_requests_total" { reason: "not_http2" } "Requests this proxy answered itself, by why.";
    RejectedNoRule "sheetbend_rejected_requests_total" { reason: "no_rule" } "Requests this proxy answered itself, by why.";
    Redirected "sheetbend_redirects_total" {} "Requests answered with where to go instead.";

    FaultDelay "sheetbend_faults_injected_total" { kind: "delay" } "Requests to which something was done on purpose.";
    FaultAbort "sheetbend_faults_injected_total" { kind: "abort" } "Requests to which something was done on purpose.";
    FaultOverflow "sheetbend_faults_overflow_total" {} "Delays left out, since too many requests were waiting on purpose.";

    OverflowConnections "sheetbend_overflow_total" { limit: "connections" } "What a limit turned away at once, by which limit.";
    OverflowPending "sheetbend_overflow_total" { limit: "pending" } "What a limit turned away at once, by which limit.";
    OverflowRequests "sheetbend_overflow_total" { limit: "requests" } "What a limit turned away at once, by which limit.";
    OverflowRetries "sheetbend_overflow_total" { limit: "retries" } "What a limit turned away at once, by which limit.";
    OverflowRoute "sheetbend_overflow_total" { limit: "route" } "What a limit turned away at once, by which limit.";

    RateLimitedOutbound "sheetbend_rate_limited_total" { side: "outbound" } "Requests that a rate limit turned away.";
    RateLimitedInbound "sheetbend_rate_limited_total" { side: "inbound" } "Requests that a rate limit turned away.";
    ShedFull "sheetbend_shed_total" { reason: "full" } "Requests kept from the app because it has enough to do, by why.";
    ShedWaited "sheetbend_shed_total" { reason: "waited" } "Requests kept from the app because it has enough to do, by why.";
    ShedLate "sheetbend_shed_total" { reason: "late" } "Requests kept from the app because it has enough to do, by why.";
    StalledRequest "sheetbend_stalled_total" { reason: "request" } "Requests that stood still while they had room at the app, by what stood still; a stream goes on without.";
    StalledAnswer "sheetbend_stalled_total" { reason: "answer" } "Requests that stood still while they had room at the app, by what stood still; a stream goes on without.";
    StalledStream "sheetbend_stalled_total" { reason: "stream" } "Requests that stood still while they had room at the app, by what stood still; a stream goes on without.";

    CheckedWell "sheetbend_health_checks_total" { result: "well" } "Health checks of endpoints, by what came of them.";
    CheckedUnwell "sheetbend_health_checks_total" { result: "unwell" } "Health checks of endpoints, by what came of them.";

    ResolvedMesh "sheetbend_resolved_total" { result: "mesh" } "Destinations traffic named, by what they turned out to be.";
    ResolvedNotMesh "sheetbend_resolved_total" { result: "not_mesh" } "Destinations traffic named, by what they turned out to be.";
    Unresolved "sheetbend_resolved_total" { result: "unresolved" } "Destinations traffic named, by what they turned out to be.";

    LookedUp "sheetbend_dns_lookups_total" { result: "found" } "Hosts of external services that were looked up.";
    NotLookedUp "sheetbend_dns_lookups_total" { result: "not_found" } "Hosts of external services that were looked up.";

    AcceptedOutbound "sheetbend_connections_total" { side: "outbound" } "Connections accepted.";
    AcceptedInbound "sheetbend_connections_total" { side: "inbound" } "Connections accepted.";
    DialedMesh "sheetbend_dials_total" { to: "mesh" } "Connections made.";
    DialedApp "sheetbend_dials_total" { to: "app" } "Connections made.";
    DialedSelf "sheetbend_dials_total" { to: "self" } "Connections made.";
    DialedExternal "sheetbend_dials_total" { to: "external" } "Connections made.";

    HandshakesFull "sheetbend_tls_handshakes_total" { kind: "full" } "TLS handshakes completed.";
    HandshakesResumed "sheetbend_tls_handshakes_total" { kind: "resumed" } "TLS handshakes completed.";

    InformationalDropped "sheetbend_informational_dropped_total" {} "Responses of class 1xx that could not be passed on.";
    EmptyDataDropped "sheetbend_empty_data_frames_dropped_total" {} "Empty HTTP/2 DATA frames that ended nothing and were not passed on.";
    UpgradesTunnelled "sheetbend_tunnels_total" { kind: "upgrade" } "Connections turned into byte tunnels.";
    ConnectsTunnelled "sheetbend_tunnels_total" { kind: "connect" } "Connections turned into byte tunnels.";

    CertificatesInstalled "sheetbend_certificate_renewals_total" { result: "ok" } "Certificates asked for.";
    CertificatesFailed "sheetbend_certificate_renewals_total" { result: "failed" } "Certificates asked for.";
    DiscoveryConnected "sheetbend_control_plane_connections_total" { result: "ok" } "Discovery streams opened.";
    DiscoveryFailed "sheetbend_control_plane_connections_total" { result: "failed" } "Discovery streams opened.";
    DiscoveryRefused "sheetbend_control_plane_updates_refused_total" {} "Updates of the control plane that were not valid (NACK).";
    ReportsFailed "sheetbend_reports_failed_total" {} "Edge reports that did not reach the control plane.";

    AccessLogDropped "sheetbend_access_log_dropped_total" {} "Access log lines dropped because writing them was too slow.";
    EdgesOverflowed "sheetbend_edges_overflowed_total" {} "Edges that found the table full and were counted as `other`.";
    SeriesOverflowed "sheetbend_series_overflowed_total" {} "Label sets that found the budget spent and were counted under overflow=\"true\".";
}

metrics_of_the_process! {
    /// A level that goes up and down.
    Gauge;
    OpenOutbound "sheetbend_open_connections" { side: "outbound" } "Connections open now.";
    OpenInbound "sheetbend_open_connections" { side: "inbound" } "Connections open now.";
    PooledMesh "sheetbend_pooled_connections" { to: "mesh" } "Connections kept for reuse now.";
    PooledPlain "sheetbend_pooled_connections" { to: "plain" } "Connections kept for reuse now.";
    ReceiveWindows "sheetbend_receive_window_bytes" {} "What peers may send over HTTP/2 before it is read, all connections together.";
    Destinations "sheetbend_destinations" {} "Destinations known from the control plane.";
    ControlPlaneConnected "sheetbend_control_plane_connected" {} "1 while the discovery stream is up.";
    CertificateExpiry "sheetbend_certificate_expiry_timestamp_seconds" {} "When this proxy's own certificate expires, in Unix time.";
    Draining "sheetbend_draining" {} "1 from the moment this proxy was told to stop.";
    SeriesInUse "sheetbend_series" {} "Time series shown here, of the 2,000 there may be.";
    EdgesInUse "sheetbend_edges" {} "Edges of the graph this proxy keeps.";
    StartTime "process_start_time_seconds" {} "When this process started, in Unix time.";
    ResidentMemory "process_resident_memory_bytes" {} "Resident memory.";
    OpenFiles "process_open_fds" {} "Open file descriptors.";
    MaxFiles "process_max_fds" {} "Open file descriptors there may be.";
}

const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

fn key(name: &'static str, labels: &'static [(&'static str, &'static str)]) -> Key {
    Key::from_parts(name, labels.iter().map(|(k, v)| Label::from_static_parts(k, v)).collect::<Vec<_>>())
}

impl Counter {
    /// What a reached limit counts as.
    pub fn overflow(limit: Limit) -> Self {
        match limit {
            Limit::Connections => Self::OverflowConnections,
            Limit::Pending => Self::OverflowPending,
            Limit::Requests => Self::OverflowRequests,
            Limit::Retries => Self::OverflowRetries,
            Limit::Route => Self::OverflowRoute,
        }
    }

    /// The reason that it counts, as its metric has it; nothing where it counts no reasons.
    pub fn reason(self) -> &'static str {
        let (_, _, labels) = self.describe();
        labels.iter().find(|(name, _)| *name == "reason").map_or("", |(_, reason)| reason)
    }

    pub(super) fn register(self, recorder: &dyn Recorder) -> metrics::Counter {
        let (name, help, labels) = self.describe();
        recorder.describe_counter(name.into(), None, help.into());
        recorder.register_counter(&key(name, labels), &METADATA)
    }
}

impl Gauge {
    pub(super) fn register(self, recorder: &dyn Recorder) -> metrics::Gauge {
        let (name, help, labels) = self.describe();
        recorder.describe_gauge(name.into(), None, help.into());
        recorder.register_gauge(&key(name, labels), &METADATA)
    }
}
