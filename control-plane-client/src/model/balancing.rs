//! How requests are spread over the endpoints of a service: `loadBalancer` of a BackendPolicy, in the words of Istio's
//! DestinationRule.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::duration;
use super::policy::Unusable;

/// `loadBalancer`. What is not said is as it is without a policy: peak EWMA, two choices, no regard for zones.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct LoadBalancer {
    /// Which endpoint, whoever asks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub simple: Option<Simple>,
    /// The same endpoint for the same caller.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consistent_hash: Option<ConsistentHash>,
    /// How an endpoint that is new, or well again, gets its share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup: Option<Warmup>,
    /// Whether near endpoints come first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub locality_lb_setting: Option<LocalityLbSetting>,
}

/// `simple`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Simple {
    /// Of two random ones the one whose latency, times what it has under way, is lower.
    #[default]
    PeakEwma,
    /// Of two random ones the one that has less under way.
    LeastRequest,
    /// One after the other.
    RoundRobin,
    /// Any.
    Random,
}

/// `consistentHash`. One of the three says what a caller is known by; a request that has it not goes anywhere.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ConsistentHash {
    /// A header's value. The name is lower case.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http_header_name: Option<Arc<str>>,
    /// A cookie's value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http_cookie: Option<HttpCookie>,
    /// The address that the connection comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub use_source_ip: Option<bool>,
    /// Places on the ring, at least; an endpoint has one or more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minimum_ring_size: Option<u32>,
}

/// `httpCookie`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct HttpCookie {
    /// Its name.
    pub name: Arc<str>,
    /// The path for which one is set that is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<Arc<str>>,
    /// How long a cookie lives that is set because it is missing; 0 is as long as the browser runs. Without it none is set.
    #[serde(with = "duration::option", skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Duration>,
}

/// `warmup`: slow start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Warmup {
    /// How long it takes to the whole share.
    #[serde(with = "duration")]
    pub duration: Duration,
    /// What it begins with, of 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minimum_percent: Option<f64>,
    /// 1 grows evenly, more grows faster at first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aggression: Option<f64>,
}

impl Warmup {
    /// Istio's, and Envoy's.
    pub const MINIMUM_PERCENT: f64 = 10.0;
    /// Even.
    pub const AGGRESSION: f64 = 1.0;
}

/// `localityLbSetting`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct LocalityLbSetting {
    /// Endpoints of the caller's zone first, the others as those fail.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
}

/// The place of an endpoint among the others of its service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Standing {
    /// Its share; 1 unless someone said more.
    pub weight: u32,
    /// 0 is asked first; the next ones as too few of those before serve.
    pub priority: u32,
    /// Where it is; empty is unknown.
    pub zone: Arc<str>,
}

impl Default for Standing {
    fn default() -> Self {
        Self { weight: 1, priority: 0, zone: "".into() }
    }
}

impl Standing {
    /// The most that one who writes resources, or registers, may say.
    pub const MAX_WEIGHT: u32 = 1_000;
    /// Envoy's limit.
    pub const MAX_PRIORITY: u32 = 127;

    /// Whether it is one that may be written or registered; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        if !(1..=Self::MAX_WEIGHT).contains(&self.weight) {
            return Err(Unusable::new("weight", "it is a number from 1 to 1000"));
        }
        if self.priority > Self::MAX_PRIORITY {
            return Err(Unusable::new("priority", "it is a number from 0 to 127"));
        }
        if self.zone.len() > 128 || self.zone.chars().any(char::is_control) {
            return Err(Unusable::new("zone", "that is no zone's name"));
        }
        Ok(())
    }
}

/// Rings have no more places than Envoy's may have.
pub const MAX_RING: u32 = 1 << 23;

impl LoadBalancer {
    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        let wrong = |field: &str, reason: &str| Err(Unusable::new(format!("loadBalancer.{field}"), reason));
        if self.simple.is_some() && self.consistent_hash.is_some() {
            return wrong("consistentHash", "either this or simple: both choose the endpoint");
        }
        if let Some(hash) = &self.consistent_hash {
            hash.check()?;
        }
        let Some(warmup) = &self.warmup else { return Ok(()) };
        if warmup.duration.is_zero() {
            return wrong("warmup.duration", "a warm-up takes some time: write 10s or so, or leave warmup out");
        }
        if !warmup.minimum_percent.is_none_or(|percent| (0.0..=100.0).contains(&percent)) {
            return wrong("warmup.minimumPercent", "it is a number from 0 to 100");
        }
        if !warmup.aggression.is_none_or(|aggression| (1.0..=100.0).contains(&aggression)) {
            return wrong("warmup.aggression", "it is a number from 1 to 100");
        }
        if self.consistent_hash.is_some() {
            return wrong("warmup", "a ring has no slow start: a caller's endpoint would change twice");
        }
        Ok(())
    }
}

impl ConsistentHash {
    fn check(&self) -> Result<(), Unusable> {
        let wrong =
            |field: &str, reason: &str| Err(Unusable::new(format!("loadBalancer.consistentHash{field}"), reason));
        let keys = [self.http_header_name.is_some(), self.http_cookie.is_some(), self.use_source_ip == Some(true)];
        if keys.iter().filter(|said| **said).count() != 1 {
            return wrong("", "write one of httpHeaderName, httpCookie and useSourceIp: true");
        }
        if let Some(name) = &self.http_header_name
            && !(is_token(name) && **name == *name.to_ascii_lowercase())
        {
            return wrong(".httpHeaderName", "that is no header's name");
        }
        if let Some(cookie) = &self.http_cookie {
            if !is_token(&cookie.name) {
                return wrong(".httpCookie.name", "that is no cookie's name");
            }
            let sound = |path: &str| path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic() && b != b';');
            if !cookie.path.as_deref().is_none_or(sound) {
                return wrong(".httpCookie.path", "a path begins with / and has neither spaces nor `;`");
            }
        }
        if self.minimum_ring_size.is_some_and(|size| size == 0 || size > MAX_RING) {
            return wrong(".minimumRingSize", "a ring has between 1 and 8388608 places");
        }
        Ok(())
    }
}

/// RFC 9110 §5.6.2.
fn is_token(text: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    (1..=256).contains(&text.len()) && text.bytes().all(good)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(json: serde_json::Value) -> String {
        let read: LoadBalancer = serde_json::from_value(json).unwrap();
        read.check().unwrap_err().field
    }

    #[test]
    fn what_cannot_be_obeyed_is_refused_with_its_field() {
        use serde_json::json;
        let field = refused(json!({"simple": "RANDOM", "consistentHash": {"useSourceIp": true}}));
        assert_eq!(field, "loadBalancer.consistentHash");
        assert_eq!(refused(json!({"consistentHash": {}})), "loadBalancer.consistentHash");
        let two = json!({"consistentHash": {"useSourceIp": true, "httpHeaderName": "x-user"}});
        assert_eq!(refused(two), "loadBalancer.consistentHash");
        let cookie = |cookie| refused(json!({"consistentHash": {"httpCookie": cookie}}));
        assert_eq!(cookie(json!({"name": "a=b"})), "loadBalancer.consistentHash.httpCookie.name");
        assert_eq!(cookie(json!({"name": "a", "path": "/;Domain=x"})), "loadBalancer.consistentHash.httpCookie.path");
        let ring = json!({"consistentHash": {"useSourceIp": true, "minimumRingSize": 0}});
        assert_eq!(refused(ring), "loadBalancer.consistentHash.minimumRingSize");
        assert_eq!(refused(json!({"warmup": {"duration": "0s"}})), "loadBalancer.warmup.duration");
        let slow = |field: &str, value: f64| refused(json!({"warmup": {"duration": "10s", field: value}}));
        assert_eq!(slow("minimumPercent", -1.0), "loadBalancer.warmup.minimumPercent");
        assert_eq!(slow("aggression", 0.5), "loadBalancer.warmup.aggression");
    }
}
