//! `/breakers` as a document that goes on: the whole first, then an event for each change.
//!
//! Requests pay nothing for it: while somebody watches, a task of the admin port's looks every tenth of a second at the
//! turns that endpoints remember by themselves.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};
use sheetbend_control_plane_client::admin_http::Event;
use tokio::sync::mpsc;

use super::{Clock, circuit_name, document, name};
use crate::admin::Refused;
use crate::traffic::outlier::{Reason, State, Turn};
use crate::upstream::{EndpointState, Endpoints};

/// How many may watch at once.
const MOST: usize = 16;
/// Who does not read so many events is told no more, and may ask again.
const UNREAD: usize = 1_024;
/// How soon a change is told.
const LOOK: Duration = Duration::from_millis(100);
/// How often those who watch hear that somebody is there.
const BREATH: Duration = Duration::from_secs(15);

/// Those who watch.
pub(crate) struct Watchers {
    endpoints: Arc<Endpoints>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    watchers: Vec<mpsc::Sender<Bytes>>,
    seen: Seen,
}

/// What those who watch know.
#[derive(Default)]
struct Seen {
    endpoints: HashMap<u64, Known>,
    /// The newest turn of each backend's circuit.
    circuits: HashMap<String, Duration>,
}

struct Known {
    backend: String,
    endpoint: String,
    turns: u32,
}

impl Watchers {
    /// Nobody yet.
    pub(crate) fn of(endpoints: Arc<Endpoints>) -> Arc<Self> {
        Arc::new(Self { endpoints, inner: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more: gives what it hears first, and what comes later.
    pub(crate) fn watch(self: &Arc<Self>) -> Result<(Bytes, mpsc::Receiver<Bytes>), Refused> {
        let mut inner = self.lock();
        let alone = inner.watchers.is_empty();
        inner.watchers.retain(|watcher| !watcher.is_closed());
        if inner.watchers.len() >= MOST {
            let why = format!("{MOST} watch already, and no more may; GET /breakers without `watch` is answered");
            return Err((StatusCode::SERVICE_UNAVAILABLE, why));
        }
        // What is new is news to the others only.
        let news = inner.seen.look(&self.endpoints);
        inner.tell(&news);
        let (watcher, events) = mpsc::channel(UNREAD);
        inner.watchers.push(watcher);
        if alone {
            tokio::spawn(Arc::clone(self).tell_all());
        }
        Ok((Event::encode("breakers", &document(&self.endpoints)), events))
    }

    /// Ends when nobody watches any more.
    async fn tell_all(self: Arc<Self>) {
        let mut breath = Instant::now();
        loop {
            tokio::time::sleep(LOOK).await;
            let mut inner = self.lock();
            let mut news = inner.seen.look(&self.endpoints);
            if breath.elapsed() >= BREATH {
                breath = Instant::now();
                news.push(Event::nothing());
            }
            inner.tell(&news);
            if inner.watchers.is_empty() {
                inner.seen = Seen::default();
                return;
            }
        }
    }
}

impl Inner {
    fn tell(&mut self, news: &[Bytes]) {
        self.watchers
            .retain(|watcher| !watcher.is_closed() && news.iter().all(|event| watcher.try_send(event.clone()).is_ok()));
    }
}

impl Seen {
    /// What has changed since the last look.
    fn look(&mut self, endpoints: &Endpoints) -> Vec<Bytes> {
        let now = endpoints.epoch.elapsed();
        let clock = Clock::at(now);
        let mut events = Vec::new();
        let mut gone = std::mem::take(&mut self.endpoints);
        for endpoint in endpoints.of_backends() {
            let known = match gone.remove(&endpoint.number()) {
                Some(known) => known,
                None => {
                    let known = Known::of(&endpoint);
                    events.push(Event::encode("added", &known.place()));
                    known
                }
            };
            let turns = endpoint.vitals.turns();
            if turns != known.turns {
                events.extend(turned(&endpoint, &known, turns, &clock));
            }
            self.endpoints.insert(endpoint.number(), Known { turns, ..known });
        }
        events.extend(gone.values().map(|known| Event::encode("removed", &known.place())));
        for (backend, shown) in endpoints.circuits(now) {
            let newest = shown.history.last().map_or(Duration::ZERO, |(at, _)| *at);
            let seen = self.circuits.insert(backend.to_string(), newest).unwrap_or_default();
            for (at, circuit) in shown.history.iter().filter(|(at, _)| *at > seen) {
                let next_trial = circuit.next_trial().map(|until| clock.time(until));
                let event = json!({
                    "backend": backend, "at": clock.time(*at), "state": circuit_name(*circuit), "next_trial": next_trial,
                });
                events.push(Event::encode("circuit", &event));
            }
        }
        events
    }
}

/// An event for each turn that is new, as far as they are remembered.
fn turned<'a>(
    endpoint: &EndpointState,
    known: &'a Known,
    turns: u32,
    clock: &'a Clock,
) -> impl Iterator<Item = Bytes> + use<'a> {
    let history = endpoint.vitals.history();
    let new = history.len().min(turns.wrapping_sub(known.turns) as usize);
    let (requests, failures) = endpoint.vitals.recent(endpoint.detection().interval, clock.now);
    (history.len() - new..history.len()).map(move |at| {
        let before = at.checked_sub(1).and_then(|before| history.get(before)).map_or(State::Serving, |turn| turn.state);
        let mut event = turn(&history[at], before, clock);
        event["backend"] = known.backend.as_str().into();
        event["endpoint"] = known.endpoint.as_str().into();
        event["requests"] = requests.into();
        event["failures"] = failures.into();
        Event::encode("turn", &event)
    })
}

fn turn(turn: &Turn, before: State, clock: &Clock) -> Value {
    let next_probe = match turn.state {
        state if state.is_until_well() => None,
        State::Ejected { until } => Some(clock.time(until)),
        State::Serving | State::Probing | State::Ramping { .. } => None,
    };
    json!({
        "at": clock.time(turn.at),
        "from": name(before),
        "state": name(turn.state),
        // It has answered well once, and gets a growing share.
        "growing": matches!(turn.state, State::Ramping { .. }),
        "reason": turn.reason.map(Reason::word),
        "next_probe": next_probe,
    })
}

impl Known {
    fn of(endpoint: &EndpointState) -> Self {
        let backend = endpoint.backend().map(ToString::to_string).unwrap_or_default();
        Self { backend, endpoint: endpoint.place.to_string(), turns: endpoint.vitals.turns() }
    }

    fn place(&self) -> Value {
        json!({ "backend": self.backend, "endpoint": self.endpoint })
    }
}

#[cfg(test)]
mod tests {
    use sheetbend_control_plane_client::model::{ClusterName, Transport};

    use super::*;
    use crate::upstream::Place;

    fn endpoint(endpoints: &Endpoints, host: u8) -> Arc<EndpointState> {
        let backend = ClusterName::from("web.default:80");
        let place = Place::Address(([127, 0, 0, host], 80).into());
        endpoints.at(place, Transport::Plain, None, Some(&backend))
    }

    fn names(news: &[Bytes]) -> Vec<String> {
        let text = |event: &Bytes| String::from_utf8_lossy(event).into_owned();
        news.iter().map(|event| text(event).lines().next().unwrap_or_default().replace("event: ", "")).collect()
    }

    #[test]
    fn every_turn_is_told_once_and_so_is_who_comes_and_goes() {
        let endpoints = Endpoints::default();
        let mut seen = Seen::default();
        let first = endpoint(&endpoints, 1);
        let second = endpoint(&endpoints, 2);
        assert_eq!(names(&seen.look(&endpoints)), ["added", "added"]);
        assert_eq!(names(&seen.look(&endpoints)), [""; 0]);
        first.restore(Duration::ZERO);
        second.restore(Duration::ZERO);
        first.restore(Duration::ZERO);
        let news = seen.look(&endpoints);
        assert_eq!(names(&news), ["turn"; 3]);
        let told = news.iter().any(|event| String::from_utf8_lossy(event).contains(r#""reason":"operator""#));
        assert!(told, "{news:?}");
        assert_eq!(names(&seen.look(&endpoints)), [""; 0]);
        drop(second);
        assert_eq!(names(&seen.look(&endpoints)), ["removed"]);
    }

    #[tokio::test]
    async fn so_many_watch_and_no_more_and_one_that_goes_makes_room() {
        let watchers = Watchers::of(Arc::default());
        let mut events: Vec<_> = (0..MOST).map(|_| watchers.watch().unwrap()).collect();
        assert_eq!(watchers.watch().unwrap_err().0, StatusCode::SERVICE_UNAVAILABLE);
        events.pop();
        assert!(watchers.watch().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn who_reads_nothing_is_told_no_more_and_the_others_are() {
        let endpoints = Arc::<Endpoints>::default();
        let held = endpoint(&endpoints, 1);
        let watchers = Watchers::of(Arc::clone(&endpoints));
        let (_, mut idle) = watchers.watch().unwrap();
        let (_, mut reads) = watchers.watch().unwrap();
        for _ in 0..2 * UNREAD {
            held.restore(Duration::ZERO);
            assert!(reads.recv().await.is_some());
        }
        let mut told = 0;
        while idle.recv().await.is_some() {
            told += 1;
        }
        assert_eq!(told, UNREAD);
        drop(reads);
        // Whoever tells ends with the last of them, and begins again with the next.
        tokio::time::sleep(LOOK * 2).await;
        let (first, mut again) = watchers.watch().unwrap();
        assert!(first.starts_with(b"event: breakers\ndata: {"));
        held.restore(Duration::ZERO);
        assert!(again.recv().await.is_some());
    }
}
