//! PURE: which faults are injected into a request. Chance comes in.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, request};
use sheetbend_control_plane_client::model::{self, TextMatch};

use super::index::header;
use crate::http::headers;

/// A fault, made ready.
#[derive(Debug)]
pub struct Fault {
    name: Arc<str>,
    headers: Vec<(HeaderName, TextMatch)>,
    delay: Option<model::Delay>,
    abort: Option<model::Abort>,
}

/// What happens to a request on purpose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Injected {
    /// It waits for so long.
    pub delay: Duration,
    /// It is answered with this, after that wait.
    pub abort: Option<Abort>,
}

/// The answer in the destination's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Abort {
    /// The FaultInjection that wants it.
    pub by: Arc<str>,
    /// The status, for what is no gRPC call.
    pub status: u16,
    /// The status of a gRPC call.
    pub grpc: Option<u16>,
}

impl Fault {
    /// Nothing where a name is no header's: no request has it.
    pub(super) fn new(fault: &model::Fault) -> Option<Self> {
        let headers = fault.headers.iter().map(|(name, value)| Some((name.parse().ok()?, value.clone())));
        Some(Self {
            name: fault.name.clone(),
            headers: headers.collect::<Option<_>>()?,
            delay: fault.delay.clone(),
            abort: fault.abort.clone(),
        })
    }
}

/// What happens to a request: the waits of all faults that choose it, and the first answer. `chance` is drawn evenly from
/// [0, 1) for each throw.
pub fn inject(faults: &[Fault], head: &request::Parts, mut chance: impl FnMut() -> f64) -> Option<Injected> {
    let mut injected = Injected::default();
    let grpc = headers::is_grpc(&head.headers);
    for fault in faults.iter().filter(|fault| fault.headers.iter().all(|(name, value)| header(head, name, value))) {
        if let Some(delay) = fault.delay.as_ref().filter(|delay| chance() * 100.0 < delay.percentage) {
            injected.delay += delay.fixed_delay;
        }
        // A gRPC status answers gRPC calls alone.
        let abort = fault.abort.as_ref().filter(|abort| grpc || abort.http_status.is_some());
        if let Some(abort) = abort.filter(|abort| injected.abort.is_none() && chance() * 100.0 < abort.percentage) {
            injected.abort = Some(Abort {
                by: fault.name.clone(),
                status: abort.http_status.unwrap_or(503),
                grpc: abort.grpc_status,
            });
        }
    }
    (injected != Injected::default()).then_some(injected)
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn fault(delay: Option<f64>, abort: Option<(f64, Option<u16>, Option<u16>)>) -> model::Fault {
        model::Fault {
            name: "default/chaos".into(),
            place: "".into(),
            headers: vec![("x-chaos".into(), TextMatch::Exact("1".into()))],
            delay: delay.map(|percentage| model::Delay { percentage, fixed_delay: Duration::from_secs(2) }),
            abort: abort.map(|(percentage, http_status, grpc_status)| model::Abort {
                percentage,
                http_status,
                grpc_status,
            }),
        }
    }

    fn injected(fault: &model::Fault, head: &request::Parts, chance: f64) -> Option<Injected> {
        inject(&[Fault::new(fault).unwrap()], head, || chance)
    }

    fn head(headers: &[(&str, &str)]) -> request::Parts {
        headers.iter().fold(Request::get("/"), |r, (n, v)| r.header(*n, *v)).body(()).unwrap().into_parts().0
    }

    #[test]
    fn a_fault_chooses_its_share_of_the_requests_that_have_its_headers() {
        let both = fault(Some(25.0), Some((10.0, Some(418), None)));
        let chosen = head(&[("x-chaos", "1")]);
        let abort = Abort { by: "default/chaos".into(), status: 418, grpc: None };
        let delay = Duration::from_secs(2);
        assert_eq!(injected(&both, &chosen, 0.0999), Some(Injected { delay, abort: Some(abort) }));
        assert_eq!(injected(&both, &chosen, 0.1), Some(Injected { delay, abort: None }));
        assert_eq!(injected(&both, &chosen, 0.25), None);
        assert_eq!(injected(&both, &head(&[("x-chaos", "2")]), 0.0), None);
        assert_eq!(injected(&both, &head(&[]), 0.0), None);
    }

    #[test]
    fn a_hundred_percent_is_every_request_and_zero_is_none() {
        let of = |percentage| injected(&fault(Some(percentage), None), &head(&[("x-chaos", "1")]), 0.999_999);
        assert!(of(100.0).is_some());
        assert!(injected(&fault(Some(0.0), None), &head(&[("x-chaos", "1")]), 0.0).is_none());
    }

    #[test]
    fn a_grpc_status_answers_grpc_calls_alone() {
        let unavailable = fault(None, Some((100.0, None, Some(14))));
        let call = head(&[("x-chaos", "1"), ("content-type", "application/grpc")]);
        let abort = injected(&unavailable, &call, 0.5).unwrap().abort.unwrap();
        assert_eq!((abort.status, abort.grpc), (503, Some(14)));
        assert_eq!(injected(&unavailable, &head(&[("x-chaos", "1")]), 0.5), None);
    }
}
