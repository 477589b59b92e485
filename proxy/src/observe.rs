//! What a running proxy shows of itself on its admin port, and the levels that are measured when somebody asks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::SystemTime;

use http::StatusCode;
use serde_json::json;
use sheetbend_certs::format_time;
use sheetbend_control_plane_client::model::{Resolution, Target};

use crate::admin::{AdminState, Refused, logging};
use crate::app::Shared;
use crate::breakers::Watchers;
use crate::route::Route;
use crate::telemetry::{Counter, Gauge};
use crate::traffic::outlier::Reason;
use crate::upstream::{Bounded, Bounds, Pooled, Windows};

/// What the admin port needs of a running proxy.
pub(crate) fn admin_state(shared: &Arc<Shared>) -> AdminState {
    let of = || Arc::clone(shared);
    let (ready, measured, dump, clusters, breakers, certs, info) = (of(), of(), of(), of(), of(), of(), of());
    let (previewed, operated) = (of(), of());
    let watchers = Watchers::of(Arc::clone(&shared.endpoints));
    AdminState {
        telemetry: Arc::clone(&shared.telemetry),
        ready: Box::new(move || match *ready.inbound_drain.borrow() {
            true => Err("draining".to_string()),
            false => Ok(()),
        }),
        measure: Box::new(move || measure(&measured)),
        config_dump: Box::new(move || {
            let snapshot = dump.discovery.snapshot();
            let known = snapshot.iter().map(|(target, resolution)| match resolution {
                Resolution::Mesh(destination) => {
                    json!({ "target": target.to_string(), "destination": &**destination })
                }
                Resolution::NotMesh => json!({ "target": target.to_string(), "destination": null }),
            });
            json!({ "strict": dump.strict, "mesh": snapshot.mesh(), "inbound": snapshot.inbound(), "known": known.collect::<Vec<_>>() })
        }),
        clusters: Box::new(move || {
            let snapshot = clusters.discovery.snapshot();
            let found = snapshot.iter().filter_map(|(_, resolution)| match resolution {
                Resolution::Mesh(destination) => Some(json!(destination.clusters)),
                Resolution::NotMesh => None,
            });
            json!({ "clusters": found.collect::<Vec<_>>(), "limits": limits(&clusters) })
        }),
        breakers: Box::new(move || crate::breakers::document(&breakers.endpoints)),
        watch: Box::new(move || watchers.watch()),
        operate: Box::new(move |asked| crate::breakers::obey(&operated.endpoints, asked)),
        preview: Box::new(move |described| preview(&previewed, described)),
        certs: Box::new(move || match certs.identity.current() {
            Some(material) => json!({
                "id": material.identity.id.to_string(),
                "not_before": format_time(material.identity.not_before),
                "not_after": format_time(material.identity.not_after),
                "roots": material.bundle.roots().iter().map(|root| root.sha256().to_string()).collect::<Vec<_>>(),
            }),
            None => serde_json::Value::Null,
        }),
        server_info: Box::new(move || {
            json!({
                "version": env!("CARGO_PKG_VERSION"),
                "pid": std::process::id(),
                "uptime_seconds": info.epoch.elapsed().as_secs(),
                "state": if *info.inbound_drain.borrow() { "draining" } else { "serving" },
            })
        }),
        log_filter: Box::new(logging::filter),
        set_log_filter: Box::new(logging::set_filter),
    }
}

/// How full every limit is, in the order of what they are of.
fn limits(shared: &Shared) -> Vec<serde_json::Value> {
    let mut all = shared.endpoints.all_bounds();
    all.sort_by(|(a, _), (b, _)| a.cmp(b));
    let shown = |(of, bounds): &(Bounded, Arc<Bounds>)| {
        let mut one = json!({ "of": of.to_string() });
        for limit in of.limits() {
            let slots = bounds.limits.of(*limit);
            one[limit.word()] = json!({ "taken": slots.taken(), "most": slots.most() });
        }
        one
    };
    let app = shared.inbound_rules.load().admission.gate().map(|gate| {
        let [requests, pending] = gate.levels().map(|(taken, most)| json!({ "taken": taken, "most": most }));
        json!({ "of": "the app", "requests": requests, "pending": pending })
    });
    all.iter().map(shown).chain(app).collect()
}

/// A request that is described and not sent: `{"to": "web:80", "method": "GET", "path": "/", "headers": {"k": "v"}}`.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Described {
    to: Target,
    #[serde(default)]
    method: Option<String>,
    #[serde(default)]
    path: Option<String>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
}

/// What would be decided for a request. A destination that is not known yet is asked for: whoever asks again is told.
fn preview(shared: &Arc<Shared>, described: &[u8]) -> Result<serde_json::Value, Refused> {
    let wrong = |why: String| (StatusCode::BAD_REQUEST, why);
    let asked: Described =
        serde_json::from_slice(described).map_err(|error| wrong(format!("not a request: {error}")))?;
    let mut request = http::Request::builder()
        .method(asked.method.as_deref().unwrap_or("GET"))
        .uri(asked.path.as_deref().unwrap_or("/"))
        .header(http::header::HOST, asked.to.to_string());
    for (name, value) in &asked.headers {
        request = request.header(name, value);
    }
    let (head, ()) = request.body(()).map_err(|error| wrong(error.to_string()))?.into_parts();
    let decided = match shared.discovery.lookup(&asked.to) {
        Some(Resolution::Mesh(destination)) => Route::preview(asked.to.clone(), destination, &shared.endpoints, &head),
        Some(Resolution::NotMesh) => json!({ "destination": null }),
        None => {
            let (shared, target) = (Arc::clone(shared), asked.to.clone());
            tokio::spawn(async move { drop(shared.discovery.resolve(&target).await) });
            let why = format!("the control plane is asked where {} is; ask again", asked.to);
            return Err((StatusCode::SERVICE_UNAVAILABLE, why));
        }
    };
    Ok(json!({ "to": asked.to.to_string(), "decided": decided }))
}

/// Levels that somebody else keeps, taken over when they are asked for: nothing is paid for them on a request's way.
fn measure(shared: &Shared) {
    let telemetry = &shared.telemetry;
    let gauge = |gauge, value: usize| telemetry.gauge_set(gauge, value as f64);
    let (mut outbound, mut inbound, mut pooled) = (0, 0, Pooled::default());
    for worker in &shared.workers {
        outbound += worker.outbound.load(Relaxed);
        inbound += worker.inbound.load(Relaxed);
        let of_worker = worker.pool.get().map(|pool| pool.pooled()).unwrap_or_default();
        pooled.mesh += of_worker.mesh;
        pooled.plain += of_worker.plain;
    }
    gauge(Gauge::OpenOutbound, outbound);
    gauge(Gauge::OpenInbound, inbound);
    gauge(Gauge::PooledMesh, pooled.mesh);
    gauge(Gauge::PooledPlain, pooled.plain);
    telemetry.gauge_set(Gauge::ReceiveWindows, Windows::given_in_all() as f64);
    gauge(Gauge::Draining, usize::from(*shared.inbound_drain.borrow()));
    let snapshot = shared.discovery.snapshot();
    let destinations = snapshot.iter().filter(|(_, resolution)| matches!(resolution, Resolution::Mesh(_))).count();
    gauge(Gauge::Destinations, destinations);

    let discovery = shared.discovery.status().borrow().clone();
    gauge(Gauge::ControlPlaneConnected, usize::from(discovery.connected));
    telemetry.count_is(Counter::DiscoveryConnected, discovery.streams);
    telemetry.count_is(Counter::DiscoveryFailed, discovery.failures);
    telemetry.count_is(Counter::DiscoveryRefused, discovery.refused);
    telemetry.count_is(Counter::ReportsFailed, shared.reporter.failures());

    let tally = shared.endpoints.tally();
    for (reason, ejections) in Reason::ALL.into_iter().zip(tally.ejections) {
        telemetry.count_is(ejected(reason), ejections);
    }
    telemetry.count_is(Counter::CircuitOpened, tally.opened);
    telemetry.count_is(Counter::NotEjectedFloor, tally.floor);
    telemetry.count_is(Counter::NotEjectedCommonCause, tally.common_cause);

    telemetry.count_is(Counter::EmptyDataDropped, crate::http::body::empty_frames());

    let identity = shared.renewal.borrow().clone();
    telemetry.count_is(Counter::CertificatesInstalled, identity.issued);
    telemetry.count_is(Counter::CertificatesFailed, identity.failed);
    if let Some(material) = shared.identity.current() {
        let expiry = material.identity.not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        telemetry.gauge_set(Gauge::CertificateExpiry, expiry.as_secs_f64());
    }
}

/// The metric of ejections for a reason.
fn ejected(reason: Reason) -> Counter {
    match reason {
        Reason::Errors => Counter::EjectedErrors,
        Reason::GatewayErrors => Counter::EjectedGatewayErrors,
        Reason::LocalFailures => Counter::EjectedLocalFailures,
        Reason::SuccessRate => Counter::EjectedSuccessRate,
        Reason::Deviation => Counter::EjectedDeviation,
        Reason::FailureShare => Counter::EjectedFailureShare,
        Reason::Probe => Counter::EjectedProbe,
        Reason::Operator => Counter::EjectedOperator,
        Reason::HealthCheck => Counter::EjectedHealthCheck,
    }
}
