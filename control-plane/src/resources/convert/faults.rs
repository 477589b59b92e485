//! Faults as they are written.

use serde_saphyr::{Location, Spanned};
use sheetbend_control_plane_client::model::{Abort, Delay, Fault, ServiceName, duration};

use super::routes::headers;
use super::{label, name_of, to_service, unweighted};
use crate::resources::kinds::{self, NumberOrName, Percentage, Reference};
use crate::resources::parse::{Checked, mistake};
use crate::resources::{FaultTarget, Faults, Parent, RouteTarget};

/// gRPC's names of its statuses, from 0.
const GRPC: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

pub(in crate::resources) fn fault_injection(raw: kinds::FaultInjection) -> Checked<Faults> {
    let object = name_of(&raw.metadata)?;
    let spec = &raw.spec;
    if spec.target_refs.value.is_empty() {
        let hint = "name a Service, an HTTPRoute or a GRPCRoute";
        return mistake(spec.target_refs.referenced, "no targetRef: this fault happens nowhere", hint);
    }
    let targets = spec.target_refs.value.iter().map(|one| target(one, &object)).collect::<Checked<_>>()?;
    let delay = spec.delay.as_ref().map(|Spanned { value: delay, referenced: at, .. }| {
        let text = &delay.fixed_delay;
        let fixed_delay = duration::parse(&text.value);
        let fixed_delay = fixed_delay.or_else(|error| mistake(text.referenced, error.to_string(), None))?;
        Checked::Ok(Delay { percentage: percentage(delay.percentage.as_ref(), *at)?, fixed_delay })
    });
    let abort = spec.abort.as_ref().map(|Spanned { value: abort, referenced: at, .. }| {
        Checked::Ok(Abort {
            percentage: percentage(abort.percentage.as_ref(), *at)?,
            http_status: abort.http_status,
            grpc_status: abort.grpc_status.as_ref().map(|status| grpc_status(status, *at)).transpose()?,
        })
    });
    let fault = Fault {
        name: format!("{}/{}", object.namespace, object.service).into(),
        place: "".into(),
        headers: headers(&spec.headers)?,
        delay: delay.transpose()?,
        abort: abort.transpose()?,
    };
    let place = |field: &str| match field.split('.').next() {
        Some("delay") => spec.delay.as_ref().map(|delay| delay.referenced),
        Some("abort") => spec.abort.as_ref().map(|abort| abort.referenced),
        _ => None,
    };
    fault.check().or_else(|error| {
        mistake(place(&error.field).unwrap_or(raw.metadata.name.referenced), error.to_string(), None)
    })?;
    Ok(Faults { object, targets, fault })
}

fn target(raw: &Reference, object: &ServiceName) -> Checked<FaultTarget> {
    let kind = raw.kind.as_ref().map(|kind| kind.value.as_str());
    let route = ["HTTPRoute", "GRPCRoute"].into_iter().find(|route| kind == Some(route));
    let Some(route) = route else {
        let (service, port) = to_service(raw, object, "targetRef")?;
        if service.namespace != object.namespace {
            let hint = "put the fault into the namespace of its Service";
            return mistake(raw.name.referenced, "a fault is about Services of its own namespace", hint);
        }
        return Ok(FaultTarget::Service(Parent { at: raw.name.referenced.into(), service, port }));
    };
    unweighted(raw, "targetRef")?;
    if raw.namespace.as_ref().is_some_and(|namespace| *namespace.value != *object.namespace) || raw.port.is_some() {
        let hint = "put the fault into the namespace of its route, and name no port";
        return mistake(raw.name.referenced, "a fault is about whole routes of its own namespace", hint);
    }
    if let Some(group) = raw.group.as_ref().filter(|group| group.value != "gateway.networking.k8s.io") {
        return mistake(group.referenced, "a route is not in this group", "write gateway.networking.k8s.io");
    }
    let name = ServiceName { service: label(&raw.name)?, namespace: object.namespace.clone() };
    Ok(FaultTarget::Route(RouteTarget { at: raw.name.referenced.into(), kind: route, name }))
}

fn percentage(raw: Option<&Percentage>, at: Location) -> Checked<f64> {
    match raw {
        Some(percentage) => Ok(percentage.value),
        None => mistake(at, "no percentage: of how many requests?", "write percentage: {value: 10}"),
    }
}

fn grpc_status(raw: &NumberOrName, at: Location) -> Checked<u16> {
    match raw {
        NumberOrName::Number(number) => Ok(*number),
        NumberOrName::Name(name) => match GRPC.iter().position(|known| known == name) {
            Some(number) => Ok(number as u16),
            None => mistake(at, format!("`{name}` is no gRPC status"), "write one like UNAVAILABLE, or 14"),
        },
    }
}
