//! `POST /breakers/ENDPOINT/eject` and `…/restore`: an operator's word about one endpoint, for a while.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use serde_json::Value;
use sheetbend_control_plane_client::admin_http::Asked;
use sheetbend_control_plane_client::model::duration;

use super::{Clock, endpoint_as_json};
use crate::admin::Refused;
use crate::traffic::outlier::{NotEjected, State};
use crate::upstream::{EndpointState, Endpoints};

/// How long an endpoint is left alone where nobody says how long.
const EJECTED: Duration = Duration::from_secs(5 * 60);
/// Nobody's word holds for longer: what is forgotten mends itself within a day.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// What an operator wants.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Word {
    /// As `/breakers` writes it.
    endpoint: String,
    /// Where several backends have it.
    backend: Option<String>,
    act: Act,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// Leave it alone for so long.
    Eject(Duration),
    /// Use it, and do not eject it for so long.
    Restore(Duration),
}

/// Does as an operator says, and gives the endpoint as `/breakers` shows it from now on.
pub(crate) fn obey(endpoints: &Endpoints, asked: &Asked) -> Result<Value, Refused> {
    let word = word(&asked.path, asked.query.as_deref())?;
    let mut all = endpoints.of_backends();
    all.sort_by_cached_key(|endpoint| (endpoint.backend().cloned(), endpoint.place.to_string()));
    let endpoint = meant(&all, &word)?;
    let (now, place) = (endpoint.now(), &endpoint.place);
    let backend = endpoint.backend().map_or("", |name| name);
    match word.act {
        Act::Eject(time) => {
            endpoint.eject(time).map_err(|why| not_ejected(why, endpoint, &all))?;
            tracing::warn!(endpoint = %place, backend, during = %duration::show(time), "an operator ejected an endpoint");
        }
        Act::Restore(time) => {
            endpoint.restore(time);
            tracing::warn!(endpoint = %place, backend, held = %duration::show(time), "an operator restored an endpoint");
        }
    }
    Ok(endpoint_as_json(endpoint, &Clock::at(now)))
}

/// Reads `/breakers/ENDPOINT/eject?ttl=30s`. A parameter that nobody knows is a mistake rather than nothing.
fn word(path: &str, query: Option<&str>) -> Result<Word, Refused> {
    let wrong = |why: String| (StatusCode::BAD_REQUEST, why);
    let rest = path.strip_prefix("/breakers/").unwrap_or_default();
    let (endpoint, act) = rest.rsplit_once('/').unwrap_or_default();
    let (mut ttl, mut backend) = (None, None);
    for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("ttl", text)) => ttl = Some(duration::parse(text).map_err(|why| wrong(format!("ttl: {why}")))?),
            Some(("backend", text)) => backend = Some(decoded(text)),
            _ => return Err(wrong(format!("`{pair}` is unknown here: write ttl=30s or backend=NAME:PORT"))),
        }
    }
    if ttl.is_some_and(|ttl| ttl > LONGEST) {
        return Err(wrong(format!("ttl: {} at most", duration::show(LONGEST))));
    }
    let act = match act {
        "eject" if ttl.is_some_and(|ttl| ttl.is_zero()) => {
            return Err(wrong("ttl: longer than 0s; to end an ejection, POST to …/restore".to_string()));
        }
        "eject" => Act::Eject(ttl.unwrap_or(EJECTED)),
        "restore" => Act::Restore(ttl.unwrap_or_default()),
        _ => {
            let why = "There is no such path. There is: POST /breakers/ENDPOINT/eject[?ttl=5m] and /restore[?ttl=30s]";
            return Err((StatusCode::NOT_FOUND, why.to_string()));
        }
    };
    Ok(Word { endpoint: decoded(endpoint), backend, act })
}

/// The endpoint that is meant.
fn meant<'a>(all: &'a [Arc<EndpointState>], word: &Word) -> Result<&'a Arc<EndpointState>, Refused> {
    let named = |one: &&Arc<EndpointState>| {
        let backend = one.backend().map_or("", |name| name);
        one.place.to_string() == word.endpoint && word.backend.as_deref().is_none_or(|wanted| wanted == backend)
    };
    // One that has just gone is remembered for a while.
    let mut found: Vec<_> = all.iter().filter(named).collect();
    if found.iter().any(|one| one.vitals.is_present()) {
        found.retain(|one| one.vitals.is_present());
    }
    match found[..] {
        [one] => Ok(one),
        [] => {
            let of = word.backend.as_deref().map(|backend| format!(" of {backend}")).unwrap_or_default();
            let why = format!("no endpoint{of} in use here is called {}. {}", word.endpoint, known(all));
            Err((StatusCode::NOT_FOUND, why))
        }
        [one, ..] => {
            let backends = found.iter().map(|one| format!("?backend={}", one.backend().map_or("", |name| name)));
            let backends = backends.collect::<Vec<_>>().join(" or ");
            let why = format!("{} is an endpoint of {} backends: say which by {backends}", one.place, found.len());
            Err((StatusCode::BAD_REQUEST, why))
        }
    }
}

fn known(all: &[Arc<EndpointState>]) -> String {
    /// The others can be read on `/breakers`.
    const SHOWN: usize = 20;
    if all.is_empty() {
        return "No endpoint of the mesh has been called yet".to_string();
    }
    let shown = all.iter().take(SHOWN);
    let shown = shown.map(|one| format!("{} ({})", one.place, one.backend().map_or("", |name| name)));
    let more = if all.len() > SHOWN { ", and others: see /breakers" } else { "" };
    format!("There are {}{more}", shown.collect::<Vec<_>>().join(", "))
}

/// Why an endpoint stays in use, and what would change that.
fn not_ejected(why: NotEjected, endpoint: &EndpointState, all: &[Arc<EndpointState>]) -> Refused {
    let (place, backend) = (&endpoint.place, endpoint.backend().map_or("", |name| name));
    let NotEjected::Floor { ejected, all: n } = why else {
        return (StatusCode::NOT_FOUND, format!("{place} is no endpoint of {backend} any more"));
    };
    let is_out = |one: &&Arc<EndpointState>| {
        one.backend() == endpoint.backend() && matches!(one.vitals.state(), State::Ejected { .. })
    };
    let out: Vec<String> = all.iter().filter(is_out).map(|one| one.place.to_string()).collect();
    let (others, mend) = match out.is_empty() {
        true => ("none is".to_string(), "add endpoints to the service".to_string()),
        false => (
            format!("{ejected} {} ejected already", if ejected == 1 { "is" } else { "are" }),
            format!("restore another one first ({}), or add endpoints to the service", out.join(", ")),
        ),
    };
    let why = format!(
        "{place} stays in use: of the {n} endpoints of {backend} {others}, and without it too few would be left. Half of \
         them stay, rounded up, and more where maxEjectionPercent or minHealthPercent say so. To eject it, {mend}"
    );
    (StatusCode::CONFLICT, why)
}

/// `%3A` is a colon; what is no such code stays as it is.
fn decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let [first, after @ ..] = rest {
        let code = after.get(..2).filter(|_| *first == b'%').and_then(|code| std::str::from_utf8(code).ok());
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &str, query: &str) -> Result<(String, Act), u16> {
        match word(path, Some(query)) {
            Ok(word) => Ok((word.endpoint, word.act)),
            Err((status, _)) => Err(status.as_u16()),
        }
    }

    #[test]
    fn a_path_says_which_endpoint_and_a_ttl_for_how_long() {
        let seconds = Duration::from_secs;
        for (path, query, expected) in [
            ("/breakers/10.0.0.1:80/eject", "", Ok(("10.0.0.1:80", Act::Eject(seconds(300))))),
            ("/breakers/10.0.0.1:80/eject", "ttl=1m30s", Ok(("10.0.0.1:80", Act::Eject(seconds(90))))),
            ("/breakers/10.0.0.1:80/eject", "ttl=24h", Ok(("10.0.0.1:80", Act::Eject(seconds(86_400))))),
            ("/breakers/10.0.0.1:80/restore", "", Ok(("10.0.0.1:80", Act::Restore(seconds(0))))),
            ("/breakers/%5B::1%5D%3a80/restore", "ttl=5s", Ok(("[::1]:80", Act::Restore(seconds(5))))),
            ("/breakers/[::1]:80/restore", "ttl=5s", Ok(("[::1]:80", Act::Restore(seconds(5))))),
            ("/breakers/10.0.0.1:80/eject", "ttl=0s", Err(400)),
            ("/breakers/10.0.0.1:80/eject", "ttl=-5s", Err(400)),
            ("/breakers/10.0.0.1:80/eject", "ttl=", Err(400)),
            ("/breakers/10.0.0.1:80/eject", "ttl=5", Err(400)),
            ("/breakers/10.0.0.1:80/eject", "ttl=24h1s", Err(400)),
            ("/breakers/10.0.0.1:80/eject", "tll=5s", Err(400)),
            ("/breakers/10.0.0.1:80/close", "", Err(404)),
            ("/breakers/eject", "", Err(404)),
        ] {
            let expected = expected.map(|(endpoint, act)| (endpoint.to_string(), act));
            assert_eq!(read(path, query), expected, "{path}?{query}");
        }
    }

    #[test]
    fn what_is_no_code_stays_as_it_is() {
        assert_eq!(["%", "%4", "%zz", "100%25", "%é"].map(decoded), ["%", "%4", "%zz", "100%", "%é"]);
    }
}
