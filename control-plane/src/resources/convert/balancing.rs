//! How requests are spread, as it is written, made into what a proxy obeys.

use serde_saphyr::{Location, Spanned};
use sheetbend_control_plane_client::model::{
    ConsistentHash, GrpcCheck, HealthCheck, HttpCheck, HttpCookie, LoadBalancer, Standing, Warmup,
};

use super::kinds;
use super::kinds::balancing as written;
use super::policy::span;
use crate::resources::parse::{Checked, mistake};

pub(super) fn load_balancer(raw: &Spanned<written::LoadBalancer>) -> Checked<LoadBalancer> {
    let written = &raw.value;
    let balancer = LoadBalancer {
        simple: written.simple,
        consistent_hash: written.consistent_hash.as_ref().map(|hash| consistent_hash(&hash.value)).transpose()?,
        warmup: written.warmup.as_ref().map(|found| warmup(&found.value)).transpose()?,
        locality_lb_setting: written.locality_lb_setting.clone(),
    };
    balancer.check().or_else(|error| {
        let hash = written.consistent_hash.as_ref().filter(|_| error.field.contains("consistentHash"));
        let warmup = written.warmup.as_ref().filter(|_| error.field.contains("warmup"));
        let at = hash.map(|found| found.referenced).or(warmup.map(|found| found.referenced));
        mistake(at.unwrap_or(raw.referenced), error.to_string(), None)
    })?;
    Ok(balancer)
}

fn consistent_hash(raw: &written::ConsistentHash) -> Checked<ConsistentHash> {
    let cookie = |cookie: &written::HttpCookie| -> Checked<HttpCookie> {
        let path = cookie.path.as_deref().map(Into::into);
        Ok(HttpCookie { name: cookie.name.as_str().into(), path, ttl: span(cookie.ttl.as_ref())? })
    };
    Ok(ConsistentHash {
        http_header_name: raw.http_header_name.as_ref().map(|name| name.to_ascii_lowercase().into()),
        http_cookie: raw.http_cookie.as_ref().map(cookie).transpose()?,
        use_source_ip: raw.use_source_ip,
        minimum_ring_size: raw.minimum_ring_size,
    })
}

fn warmup(raw: &written::Warmup) -> Checked<Warmup> {
    Ok(Warmup {
        duration: span(Some(&raw.duration))?.unwrap_or_default(),
        minimum_percent: raw.minimum_percent,
        aggression: raw.aggression,
    })
}

pub(super) fn health_check(raw: &Spanned<written::HealthCheck>) -> Checked<HealthCheck> {
    let written = &raw.value;
    let http = |http: &written::HttpCheck| HttpCheck {
        path: http.path.as_str().into(),
        expected_statuses: http.expected_statuses.clone(),
    };
    let check = HealthCheck {
        http: written.http.as_ref().map(http),
        grpc: written.grpc.as_ref().map(|grpc| GrpcCheck { service: grpc.service.as_deref().unwrap_or("").into() }),
        tcp: written.tcp,
        interval: span(written.interval.as_ref())?,
        timeout: span(written.timeout.as_ref())?,
        healthy_threshold: written.healthy_threshold,
        unhealthy_threshold: written.unhealthy_threshold,
        jitter: span(written.jitter.as_ref())?,
    };
    check.check().or_else(|error| mistake(raw.referenced, error.to_string(), None))?;
    Ok(check)
}

pub(super) const WEIGHT: &str = "sheetbend.io/weight";
pub(super) const PRIORITY: &str = "sheetbend.io/priority";

/// [`WEIGHT`] and [`PRIORITY`] of an EndpointSlice; they hold for all endpoints in it.
pub(super) fn standing(meta: &kinds::Meta) -> Checked<Standing> {
    let number = |key: &str, usual: u32| match meta.annotations.get(key) {
        None => Ok((usual, Location::UNKNOWN)),
        Some(text) => match text.value.parse() {
            Ok(number) => Ok((number, text.referenced)),
            Err(_) => mistake(text.referenced, format!("`{}` is not a number", text.value), None),
        },
    };
    let (weight, weight_at) = number(WEIGHT, 1)?;
    let (priority, priority_at) = number(PRIORITY, 0)?;
    let standing = Standing { weight, priority, ..Standing::default() };
    standing.check().or_else(|error| {
        let at = if error.field == "weight" { weight_at } else { priority_at };
        mistake(at, format!("sheetbend.io/{error}"), None)
    })?;
    Ok(standing)
}

/// For which zone an endpoint is: a hint's, since whoever made the slice has thought about it, or the one that it is in.
pub(super) fn zone(raw: &kinds::SliceEndpoint, standing: &Standing) -> Checked<Standing> {
    let hinted = raw.hints.as_ref().and_then(|hints| hints.for_zones.first()).map(|zone| &zone.name);
    let Some(zone) = hinted.or(raw.zone.as_ref()) else { return Ok(standing.clone()) };
    let standing = Standing { zone: zone.value.as_str().into(), ..standing.clone() };
    standing.check().or_else(|error| mistake(zone.referenced, error.to_string(), None))?;
    Ok(standing)
}
