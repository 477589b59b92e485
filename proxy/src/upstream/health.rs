//! Endpoints that are asked whether they are well, where a policy says so: apart from requests, once a process however
//! many workers it has, and over the wire that requests take.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HOST, TE, USER_AGENT};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use sheetbend_certs::MeshAlpn;
use sheetbend_control_plane_client::model::{ClusterName, GrpcCheck, HealthCheck, HttpCheck, Statuses, Transport};
use tokio::io::AsyncReadExt;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use super::dial::Dialed;
use super::{DialError, EndpointState, Own, dial};
use crate::app::Shared;
use crate::http::headers::{self, SENT_VERSION};
use crate::telemetry::Counter;
use crate::traffic::outlier::Floor;

/// Checks under way at once: thousands of endpoints are asked one after the other rather than all together.
const AT_ONCE: usize = 64;
/// Those of one backend: endpoints that never answer do not keep others from being asked.
const AT_ONCE_EACH: usize = 16;
/// What is read of an answer; what it says is in its head, or in the first bytes.
const MOST_READ: usize = 64 * 1024;
/// How long a connection is watched that was made. A sidecar closes it again if the app behind it takes none.
const WATCHED: Duration = Duration::from_millis(250);

/// What checks have said so far of an endpoint. What it is taken to be outlives this. PURE.
#[derive(Debug, Default)]
struct Judge {
    /// Answers in a row that say otherwise.
    others: u32,
}

impl Judge {
    /// Hears of one more check of an endpoint that is taken to be `well` or not. Whether it is the other from now on.
    fn hear(&mut self, good: bool, well: bool, check: &HealthCheck) -> bool {
        if good == well {
            self.others = 0;
            return false;
        }
        self.others += 1;
        let enough = match good {
            true => check.healthy_threshold.unwrap_or(HealthCheck::HEALTHY_THRESHOLD),
            false => check.unhealthy_threshold.unwrap_or(HealthCheck::UNHEALTHY_THRESHOLD),
        };
        let turns = self.others >= enough;
        if turns {
            self.others = 0;
        }
        turns
    }
}

/// Which backends are checked, as the routes in use say.
#[derive(Default)]
pub(crate) struct Checks {
    plans: Mutex<HashMap<ClusterName, Vec<Plan>>>,
    changed: Notify,
}

/// A backend's endpoints, for as long as some route leads to them.
#[derive(Clone)]
struct Plan {
    check: Option<HealthCheck>,
    floor: Arc<Floor>,
    endpoints: Weak<[Arc<EndpointState>]>,
}

impl Checks {
    /// A backend's endpoints are these, and checked in this way from now on. Of what several workers say, the last counts.
    pub(crate) fn follow(
        &self,
        backend: &ClusterName,
        check: Option<&HealthCheck>,
        floor: &Arc<Floor>,
        endpoints: &Arc<[Arc<EndpointState>]>,
    ) {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if check.is_none() {
            // One that was away while checks of it ended is not asked again.
            let is_left = |endpoint: &&Arc<EndpointState>| endpoint.vitals.awaits_checks();
            endpoints.iter().find(is_left).inspect(|endpoint| floor.unchecked(endpoint.now()));
            // The usual case: nobody has ever wanted checks of it.
            if !plans.contains_key(backend) {
                return;
            }
        }
        let plans = plans.entry(backend.clone()).or_default();
        plans.retain(|plan| plan.endpoints.strong_count() > 0);
        plans.push(Plan { check: check.cloned(), floor: Arc::clone(floor), endpoints: Arc::downgrade(endpoints) });
        self.changed.notify_one();
    }

    /// Those that are to be checked, and how.
    fn current(&self) -> Vec<(ClusterName, HealthCheck, Plan)> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        plans.values_mut().for_each(|plans| plans.retain(|plan| plan.endpoints.strong_count() > 0));
        plans.retain(|_, plans| plans.iter().any(|plan| plan.check.is_some()));
        let last = plans.iter().filter_map(|(name, plans)| Some((name.clone(), plans.last()?.clone())));
        last.filter_map(|(name, plan)| Some((name, plan.check.clone()?, plan))).collect()
    }
}

/// A check that goes on until this is dropped.
struct Going {
    check: HealthCheck,
    task: AbortHandle,
}

impl Drop for Going {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Checks whatever is to be checked. Ends only by being dropped.
pub(crate) async fn run(shared: Arc<Shared>) {
    /// Routes that nobody uses any more say nothing when they go.
    const LOOK: Duration = Duration::from_secs(10);
    // Of a worker there is none here: what this proxy serves itself is called as others call it.
    let own = Own::new(Arc::clone(&shared.here), shared.discovery.clone(), &mpsc::unbounded_channel().0);
    let (own, all) = (Arc::new(own), Arc::new(Semaphore::new(AT_ONCE)));
    let mut going: HashMap<(ClusterName, u64), Going> = HashMap::new();
    let mut checked: HashMap<ClusterName, (Arc<Floor>, Arc<Semaphore>)> = HashMap::new();
    loop {
        let (mut wanted, mut left) = (HashMap::new(), std::mem::take(&mut checked));
        for (name, check, plan) in shared.endpoints.checks.current() {
            let Some(endpoints) = plan.endpoints.upgrade() else { continue };
            let places = left.remove(&name).map(|(_, places)| places);
            let places = places.unwrap_or_else(|| Arc::new(Semaphore::new(AT_ONCE_EACH)));
            checked.insert(name.clone(), (Arc::clone(&plan.floor), Arc::clone(&places)));
            plan.floor.follow_checks(shared.endpoints.epoch.elapsed());
            for endpoint in endpoints.iter() {
                let key = (name.clone(), endpoint.number);
                let known = going.remove(&key).filter(|known| known.check == check && !known.task.is_finished());
                let going = known.unwrap_or_else(|| {
                    let this = (Arc::clone(&shared), Arc::clone(&own), [Arc::clone(&places), Arc::clone(&all)]);
                    let keep = keep_asking(this, Arc::clone(&plan.floor), Arc::downgrade(endpoint), check.clone());
                    Going { check: check.clone(), task: tokio::spawn(keep).abort_handle() }
                });
                wanted.insert(key, going);
            }
        }
        // What is left of the former ones ends here, before what they said does.
        going = wanted;
        let now = shared.endpoints.epoch.elapsed();
        left.into_values().for_each(|(floor, _)| floor.unchecked(now));
        let _ = timeout(LOOK, shared.endpoints.checks.changed.notified()).await;
    }
}

/// Asks one endpoint, time after time, until nobody leads there any more.
async fn keep_asking(
    (shared, own, places): (Arc<Shared>, Arc<Own>, [Arc<Semaphore>; 2]),
    floor: Arc<Floor>,
    endpoint: Weak<EndpointState>,
    check: HealthCheck,
) {
    /// The first check comes soon, so that a dead newcomer is known for one.
    const FIRST: Duration = Duration::from_secs(1);
    let interval = check.interval.unwrap_or(HealthCheck::INTERVAL);
    let within = check.timeout.unwrap_or(HealthCheck::TIMEOUT);
    let mut judge = Judge::default();
    sleep(interval.min(FIRST).mul_f64(rand::random())).await;
    while let Some(endpoint) = endpoint.upgrade() {
        let asked = {
            let [of_backend, all] = &places;
            let _places = (of_backend.acquire().await, all.acquire().await);
            timeout(within, ask(&shared, &own, &endpoint, &check)).await
        };
        let why = match asked {
            Ok(Ok(())) => None,
            Ok(Err(why)) => Some(why),
            Err(_) => Some(Unwell::Silent(within)),
        };
        shared.telemetry.count(if why.is_none() { Counter::CheckedWell } else { Counter::CheckedUnwell });
        let good = why.is_none();
        if judge.hear(good, !endpoint.vitals.is_unwell(), &check) {
            floor.checked(&endpoint.vitals, good, endpoint.now());
            match why {
                Some(why) => tracing::warn!(endpoint = %endpoint.place, %why, "an endpoint fails its health checks"),
                None => tracing::info!(endpoint = %endpoint.place, "an endpoint passes its health checks again"),
            }
        }
        drop(endpoint);
        sleep(interval + check.jitter.unwrap_or_default().mul_f64(rand::random())).await;
    }
}

/// Why an endpoint did not pass a check.
#[derive(Debug, thiserror::Error)]
enum Unwell {
    #[error("no answer within {0:?}")]
    Silent(Duration),
    #[error("{0}")]
    Unreachable(#[from] DialError),
    #[error("the connection broke: {0}")]
    Broke(#[from] hyper::Error),
    #[error("the connection was closed at once")]
    Closed,
    #[error("it answered {0}")]
    Status(StatusCode),
    #[error("it is not SERVING (grpc-status {grpc_status:?}, health status {status:?})")]
    NotServing { grpc_status: Option<u16>, status: Option<i32> },
    #[error("it cannot be asked: {0}")]
    Request(#[from] http::Error),
}

async fn ask(shared: &Shared, own: &Own, endpoint: &EndpointState, check: &HealthCheck) -> Result<(), Unwell> {
    let alpn = match (&check.http, &check.grpc, &endpoint.transport) {
        (None, None, _) => MeshAlpn::Tcp,
        (Some(_), None, Transport::Plain) => MeshAlpn::Http1,
        _ => MeshAlpn::H2,
    };
    let mut dialed = dial(endpoint, alpn, &shared.identity, &shared.telemetry, own).await?;
    match (&check.http, &check.grpc) {
        (Some(http), _) => ask_http(dialed, endpoint, http).await,
        (None, Some(grpc)) => ask_grpc(dialed, endpoint, grpc).await,
        (None, None) => match timeout(WATCHED, dialed.io.read_u8()).await {
            Ok(Err(_)) => Err(Unwell::Closed),
            Ok(Ok(_)) | Err(_) => Ok(()),
        },
    }
}

async fn ask_http(dialed: Dialed, endpoint: &EndpointState, check: &HttpCheck) -> Result<(), Unwell> {
    let mut request = request(endpoint, Method::GET, &check.path, dialed.http2, Bytes::new())?;
    if endpoint.is_ours() {
        // The app is asked in the version in which kubelets and Envoys ask.
        request.headers_mut().insert(SENT_VERSION, HeaderValue::from_static("1.1"));
    }
    let answer = send(dialed, request).await?;
    let usual = [Statuses { start: 200, end: 299 }];
    let expected = if check.expected_statuses.is_empty() { &usual[..] } else { &check.expected_statuses };
    let status = answer.status();
    match expected.iter().any(|range| (range.start..=range.end).contains(&status.as_u16())) {
        true => Ok(()),
        false => Err(Unwell::Status(status)),
    }
}

/// `grpc.health.v1.HealthCheckRequest`.
#[derive(Clone, PartialEq, Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// `grpc.health.v1.HealthCheckResponse`.
#[derive(Clone, PartialEq, Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `ServingStatus.SERVING`.
const SERVING: i32 = 1;

async fn ask_grpc(mut dialed: Dialed, endpoint: &EndpointState, check: &GrpcCheck) -> Result<(), Unwell> {
    // gRPC is HTTP/2, whatever the endpoint says of itself.
    dialed.http2 = true;
    let message = HealthCheckRequest { service: check.service.to_string() }.encode_to_vec();
    let mut framed = BytesMut::with_capacity(5 + message.len());
    framed.put_u8(0);
    framed.put_u32(message.len() as u32);
    framed.put_slice(&message);
    let mut request = request(endpoint, Method::POST, "/grpc.health.v1.Health/Check", true, framed.freeze())?;
    request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
    let answer = send(dialed, request).await?;
    if answer.status() != StatusCode::OK {
        return Err(Unwell::Status(answer.status()));
    }
    let in_head = headers::grpc_status(answer.headers());
    let body = Limited::new(answer.into_body(), MOST_READ).collect().await.map_err(|_| Unwell::Closed)?;
    let grpc_status = in_head.or_else(|| body.trailers().and_then(headers::grpc_status));
    let bytes = body.to_bytes();
    let status = bytes.get(5..).and_then(|message| HealthCheckResponse::decode(message).ok());
    match (grpc_status, status.map(|found| found.status)) {
        (Some(0), Some(SERVING)) => Ok(()),
        (grpc_status, status) => Err(Unwell::NotServing { grpc_status, status }),
    }
}

fn request(
    endpoint: &EndpointState,
    method: Method,
    path: &str,
    http2: bool,
    body: Bytes,
) -> Result<Request<Full<Bytes>>, http::Error> {
    let authority = match &endpoint.service {
        Some((name, _)) => name.to_string(),
        None => endpoint.place.to_string(),
    };
    let builder = Request::builder().method(method).header(USER_AGENT, "sheetbend-health-check");
    let builder = match http2 {
        true => builder.uri(Uri::builder().scheme("http").authority(authority).path_and_query(path).build()?),
        false => builder.uri(path).header(HOST, authority),
    };
    builder.body(Full::new(body))
}

/// One exchange on a connection of its own, which goes with the answer's body.
async fn send(dialed: Dialed, request: Request<Full<Bytes>>) -> Result<Response<Connected>, Unwell> {
    use hyper::client::conn::{http1, http2};
    let io = TokioIo::new(dialed.io);
    let (answer, task) = match dialed.http2 {
        true => {
            let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
            let task = Task(tokio::spawn(connection).abort_handle());
            (sender.send_request(request).await?, task)
        }
        false => {
            let (mut sender, connection) = http1::handshake(io).await?;
            let task = Task(tokio::spawn(connection).abort_handle());
            (sender.send_request(request).await?, task)
        }
    };
    Ok(answer.map(|body| Connected { body, _task: task }))
}

/// A connection that ends when this is dropped.
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

pin_project_lite::pin_project! {
    /// An answer's body, and the connection that it comes over.
    struct Connected {
        #[pin]
        body: Incoming,
        _task: Task,
    }
}

impl http_body::Body for Connected {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, hyper::Error>>> {
        self.project().body.poll_frame(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_takes_as_many_answers_in_a_row_as_the_policy_says() {
        let check = HealthCheck { unhealthy_threshold: Some(3), healthy_threshold: Some(2), ..HealthCheck::default() };
        let (mut judge, mut well) = (Judge::default(), true);
        let mut heard = |answers: &[bool]| {
            answers.iter().for_each(|good| well ^= judge.hear(*good, well, &check));
            well
        };
        assert!(heard(&[true, false, false, true, false, false]));
        assert!(!heard(&[false]));
        assert!(!heard(&[false, false, false, true, false, true]));
        assert!(heard(&[true]));
    }
}
