//! An endpoint that was picked for a request, until what came of it has been reported.

use std::sync::Arc;
use std::time::Duration;

use super::{DialError, EndpointState};
use crate::http::body::{Passed, UNREAD};
use crate::http::deadline::{Deadline, SetBy};
use crate::http::error::{Processed, h2_reason};
use crate::http::headers;
use crate::traffic::breaker::Admitted;
use crate::traffic::outlier::{Fault, Outcome, Picked, Sent, State};

/// How far a request has come on its way to an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It waits: for its turn, for room, for what somebody else dials.
    Waits,
    /// A connection is made for it.
    Dials,
    /// It may have an effect.
    Sent,
}

/// The use of an endpoint, which hears of it once: with the end of the answer, with what failed, or, when this is dropped
/// before, that somebody gave up. Whoever is being tried has passed with the head of its answer; if that breaks off later,
/// it is one failure more.
pub struct Lease {
    /// Whose.
    pub endpoint: Arc<EndpointState>,
    sent: Sent,
    /// By the destination's breaker, which hears of it once.
    admitted: Option<Admitted>,
    /// On the clock of the endpoint.
    began: Duration,
    stage: Stage,
    /// When it first was the endpoint that was waited for.
    asked: Duration,
    deadline: Option<Deadline>,
    /// What passes of the request's body, where there is one.
    request: Option<Arc<Passed>>,
    reported: bool,
    /// When the answer began.
    headed: Option<Duration>,
    /// And something of its body came.
    moved: bool,
}

impl Lease {
    /// Of a pick.
    pub(crate) fn of(endpoint: Arc<EndpointState>, picked: Picked, admitted: Option<Admitted>, now: Duration) -> Self {
        let sent = Sent { probe: picked.probe, turn: endpoint.vitals.turns(), at: now };
        Self {
            endpoint,
            sent,
            admitted,
            began: now,
            stage: Stage::Waits,
            asked: now,
            deadline: None,
            request: None,
            reported: false,
            headed: None,
            moved: false,
        }
    }

    /// Of the only one there is, such as the app.
    pub(crate) fn alone(endpoint: Arc<EndpointState>) -> Self {
        let now = endpoint.now();
        Self::of(endpoint, Picked { at: 0, probe: false }, None, now)
    }

    /// How far the request has come.
    pub(crate) fn stage(&self) -> Stage {
        self.stage
    }

    /// A connection is made for it.
    pub(super) fn dials(&mut self) {
        (self.stage, self.asked) = (Stage::Dials, self.endpoint.now());
    }

    /// It has a connection that it had to wait for. What that took says nothing of how soon the endpoint answers.
    pub(crate) fn connects(&mut self) {
        self.began = self.endpoint.now();
        if self.stage == Stage::Waits {
            self.asked = self.began;
        }
    }

    /// It may have an effect from now on.
    pub(crate) fn sends(&mut self) {
        self.stage = Stage::Sent;
    }

    /// When the caller will no longer care, and what passes of its request.
    pub(crate) fn until(&mut self, deadline: Option<Deadline>, request: Option<&Arc<Passed>>) {
        self.deadline = deadline;
        self.request = request.cloned();
    }

    /// The head of an answer: what it says of the endpoint. Gives whether the end of what is to come, if there is `more`, says
    /// something too.
    pub(crate) fn answered(&mut self, says: Result<(), Fault>, more: bool) -> bool {
        if let Err(fault) = says {
            self.failed(fault);
            return false;
        }
        let now = self.endpoint.now();
        self.endpoint.vitals.load.sample(now.saturating_sub(self.began), now);
        self.headed = Some(now);
        // Nobody waits for the end of a stream to learn whether an endpoint is back. Whether one that serves is in doubt
        // for a reason, only the end shows.
        let tries = self.sent.probe && self.endpoint.vitals.state() == State::Probing;
        if !more || tries || self.admitted.is_some_and(Admitted::is_trial) {
            self.report(Outcome::Good);
        } else if self.sent.probe {
            self.leave_question();
        }
        more
    }

    /// Others may ask what it was to find out, for as long as it takes.
    fn leave_question(&mut self) {
        if let Some(floor) = &self.endpoint.floor {
            floor.report(&self.endpoint.vitals, self.sent, Outcome::Unknown, self.endpoint.now(), rand::random);
        }
        self.sent.probe = false;
    }

    /// Something of the answer's body came. One that goes on for long has gone well so far: if it breaks off later, that is
    /// one failure more.
    pub(crate) fn moved(&mut self) {
        const LONG: Duration = Duration::from_secs(1);
        if self.reported {
            return;
        }
        self.moved = true;
        if self.headed.is_some_and(|headed| self.endpoint.now().saturating_sub(headed) >= LONG) {
            self.report(Outcome::Good);
        }
    }

    /// The whole answer came.
    pub(crate) fn complete(&mut self) {
        if !self.reported {
            self.report(Outcome::Good);
        }
    }

    /// Its proxy kept the request from it, since it has enough to do: others are asked rather, and nothing is held against
    /// it.
    pub(crate) fn shed(&mut self) {
        self.endpoint.vitals.load.failed(self.endpoint.now());
        self.report(Outcome::Unknown);
    }

    /// The trailers of an answer, with a gRPC status.
    pub(crate) fn ended(&mut self, grpc_status: u16) {
        match headers::grpc_fault(grpc_status) {
            _ if grpc_status == headers::GRPC_DEADLINE_EXCEEDED => self.expired(),
            Some(fault) => self.failed(fault),
            None => self.complete(),
        }
    }

    /// The connection or the stream broke in the middle of an answer: whose caller left its request unfinished, whose caller
    /// does not read, as its proxy says, or which the endpoint gave up.
    pub(crate) fn broke_off(&mut self, error: &hyper::Error) {
        let callers = self.request.as_ref().is_some_and(|request| request.broke());
        match callers || self.endpoint.is_ours() && h2_reason(error) == Some(UNREAD) {
            true => self.report(Outcome::Unknown),
            false => self.failed(Fault::LocalOrigin),
        }
    }

    /// The endpoint failed: instead of an answer, or in the middle of one.
    fn failed(&mut self, fault: Fault) {
        self.endpoint.vitals.load.failed(self.endpoint.now());
        self.report(Outcome::Bad(fault));
    }

    /// Opaque bytes: the connection is all that is seen of it.
    pub(crate) fn connected(&mut self) {
        self.report(Outcome::Good);
    }

    /// No connection.
    pub(crate) fn unreachable(&mut self, error: &DialError) {
        match error {
            DialError::First(error) => self.unreachable(error),
            // We refused ourselves, or somebody else reports it.
            DialError::Loop(_)
            | DialError::OfMesh(_)
            | DialError::Overflow(_)
            | DialError::WaitedTooLong(_)
            | DialError::NoTurn
            | DialError::NoIdentity
            | DialError::OwnExpired(_)
            | DialError::Shared(_) => self.report(Outcome::Unknown),
            DialError::Tcp(_)
            | DialError::TcpTimeout(_)
            | DialError::Handshake(_)
            | DialError::HandshakeTimeout(_)
            | DialError::Peer(_)
            | DialError::Identity { .. }
            | DialError::Protocol
            | DialError::Http(_) => self.failed(Fault::LocalOrigin),
        }
    }

    /// The connection or the stream broke before an answer came.
    pub(crate) fn broken(&mut self, processed: Processed) {
        match processed {
            // It was not sent, or politely declined: a connection that ends is no failure.
            Processed::No(_) => self.report(Outcome::Unknown),
            Processed::Maybe => self.failed(Fault::LocalOrigin),
        }
    }

    /// It was asked in HTTP/2, of which it knows nothing: whoever set that up is to blame, and every other is like it.
    pub(crate) fn misunderstood(&mut self) {
        self.report(Outcome::Unknown);
    }

    /// The caller went away in the middle of its request.
    pub(crate) fn hung_up(&mut self) {
        self.report(Outcome::Unknown);
    }

    /// A deadline passed, there or here.
    pub(crate) fn expired(&mut self) {
        if self.stage == Stage::Waits {
            return self.waited();
        }
        let now = self.endpoint.now();
        self.endpoint.vitals.load.longer_than(now.saturating_sub(self.began), now);
        // What it took to connect is a part of the time that it had.
        let had = now.saturating_sub(self.asked);
        match blames(self.deadline.map(Deadline::set_by), had) && !self.waits_for_caller() {
            true => self.failed(Fault::LocalOrigin),
            false => self.report(Outcome::Unknown),
        }
    }

    /// Whether it is the caller who set the deadline.
    pub(crate) fn is_callers_deadline(&self) -> bool {
        self.deadline.is_some_and(|deadline| deadline.set_by() != SetBy::Route)
    }

    /// It took longer for the head of its answer than an attempt may take, or nothing moved for longer than may be: by the
    /// route's word, and not by its caller's.
    pub(crate) fn too_slow(&mut self) {
        if self.stage == Stage::Waits {
            return self.waited();
        }
        let now = self.endpoint.now();
        self.endpoint.vitals.load.longer_than(now.saturating_sub(self.began), now);
        match self.waits_for_caller() {
            true => self.report(Outcome::Unknown),
            false => self.failed(Fault::LocalOrigin),
        }
    }

    /// Whether more of the request is wanted, and does not come: what stands still then is nobody's but its caller's.
    fn waits_for_caller(&self) -> bool {
        self.request.as_ref().is_some_and(|request| request.is_waited_for())
    }

    /// Its time was over while it waited for its turn, or for room: one connection that takes long is one fault, however many
    /// wait for it.
    fn waited(&mut self) {
        let now = self.endpoint.now();
        self.endpoint.vitals.load.longer_than(now.saturating_sub(self.began), now);
        self.report(Outcome::Unknown);
    }

    fn report(&mut self, outcome: Outcome) {
        let sent = Sent { probe: self.sent.probe && !self.reported, ..self.sent };
        self.reported = true;
        let (endpoint, now) = (&self.endpoint, self.endpoint.now());
        let Some(floor) = &endpoint.floor else { return };
        // Of who has passed with its head, more may be heard.
        let admitted = if outcome == Outcome::Good { self.admitted } else { self.admitted.take() };
        if let Some(admitted) = admitted
            && floor.breaker.report(admitted, outcome, now)
        {
            tracing::warn!(backend = endpoint.backend().map_or("", |name| name), "opened the circuit");
        }
        let ejected = floor.report(&endpoint.vitals, sent, outcome, now, rand::random);
        if let Some(reason) = ejected {
            let (state, period) = (endpoint.vitals.state(), endpoint.vitals.period());
            tracing::warn!(endpoint = %endpoint.place, ?reason, ?state, ?period, "ejected an endpoint");
        }
    }
}

impl Drop for Lease {
    /// Somebody gave up: before there was an answer, or in the middle of one. Of a stream that has no end, that something of
    /// it came is as good as a whole answer.
    fn drop(&mut self) {
        if self.reported {
            return;
        }
        if self.headed.is_some() {
            return self.report(if self.moved { Outcome::Good } else { Outcome::Unknown });
        }
        if self.deadline.is_some_and(|deadline| deadline.left().is_zero()) {
            return self.expired();
        }
        let now = self.endpoint.now();
        self.endpoint.vitals.load.longer_than(now.saturating_sub(self.began), now);
        self.report(Outcome::Unknown);
    }
}

/// Whether a deadline that passed speaks against an endpoint: where the mesh's operator set it, and it had time enough. Whoever
/// calls can ask for less than what a healthy method takes, as often as it likes.
fn blames(set_by: Option<SetBy>, had: Duration) -> bool {
    /// A shorter time is too short to say anything: a second of a route, but for what passed before it was picked.
    const ENOUGH: Duration = Duration::from_millis(950);
    match set_by {
        Some(SetBy::GrpcTimeout | SetBy::Expected) => false,
        Some(SetBy::Route) | None => had >= ENOUGH,
    }
}

#[cfg(test)]
mod tests {
    use sheetbend_control_plane_client::model::{ClusterName, Transport};

    use super::super::{Endpoints, Place};
    use super::*;

    fn endpoint() -> Arc<EndpointState> {
        let backend = ClusterName::from("web.default:80");
        Endpoints::default().at(Place::Address(([127, 0, 0, 1], 80).into()), Transport::Plain, None, Some(&backend))
    }

    /// A request of which the head of the answer came, and more is to come.
    fn begun(endpoint: &Arc<EndpointState>) -> Lease {
        let picked = Picked { at: 0, probe: false };
        let mut lease = Lease::of(Arc::clone(endpoint), picked, None, endpoint.now());
        lease.sends();
        assert!(lease.answered(Ok(()), true));
        lease
    }

    /// Requests, failures, and failures in a row.
    fn heard(endpoint: &EndpointState) -> (u32, u32, u32) {
        let (all, bad) = endpoint.vitals.recent(Duration::from_secs(10), endpoint.now());
        (all, bad, endpoint.vitals.in_a_row().errors)
    }

    #[test]
    fn an_answer_that_stops_in_the_middle_is_a_failure_and_no_success() {
        let endpoint = endpoint();
        for _ in 0..3 {
            let mut lease = begun(&endpoint);
            lease.moved();
            lease.too_slow();
        }
        assert_eq!(heard(&endpoint), (3, 3, 3));
        let mut lease = begun(&endpoint);
        lease.complete();
        drop(lease);
        assert_eq!(heard(&endpoint), (4, 3, 0));
    }

    #[test]
    fn whoever_leaves_in_the_middle_of_an_answer_holds_nothing_against_it_and_what_came_of_a_stream_speaks_for_it() {
        let endpoint = endpoint();
        drop(begun(&endpoint));
        assert_eq!(heard(&endpoint), (0, 0, 0), "nothing came that says anything");
        let mut lease = begun(&endpoint);
        lease.moved();
        drop(lease);
        assert_eq!(heard(&endpoint), (1, 0, 0));
    }

    #[tokio::test]
    async fn whoever_reads_an_answer_until_its_time_is_over_holds_nothing_against_it() {
        let endpoint = endpoint();
        let long_ago = std::time::Instant::now();
        let mut lease = begun(&endpoint);
        lease.until(Deadline::of_route(long_ago, Duration::ZERO, false), None);
        lease.moved();
        drop(lease);
        assert_eq!(heard(&endpoint), (1, 0, 0));
    }

    /// An endpoint that has been known for ten seconds.
    fn known() -> Arc<EndpointState> {
        let epoch = std::time::Instant::now() - Duration::from_secs(10);
        let endpoints = Endpoints { epoch, ..Endpoints::default() };
        let backend = ClusterName::from("web.default:80");
        endpoints.at(Place::Address(([127, 0, 0, 1], 80).into()), Transport::Plain, None, Some(&backend))
    }

    #[tokio::test]
    async fn whoever_had_no_connection_in_time_holds_it_against_the_endpoint_only_if_that_was_asked() {
        let endpoint = known();
        let over = || {
            let picked = Picked { at: 0, probe: false };
            let mut lease = Lease::of(Arc::clone(&endpoint), picked, None, Duration::ZERO);
            lease.until(Deadline::of_route(std::time::Instant::now(), Duration::ZERO, false), None);
            lease
        };
        drop(over());
        over().too_slow();
        let mut late = over();
        late.connects();
        late.sends();
        drop(late);
        assert_eq!(heard(&endpoint), (0, 0, 0), "all of them waited for room");
        let mut sent = over();
        sent.sends();
        drop(sent);
        assert_eq!(heard(&endpoint), (1, 1, 1));
    }

    #[test]
    fn an_answer_that_goes_on_for_long_has_gone_well_and_its_break_is_one_failure_more() {
        let endpoint = known();
        let mut lease = begun(&endpoint);
        lease.moved();
        assert_eq!(heard(&endpoint), (0, 0, 0), "it has only just begun");
        lease.headed = Some(Duration::ZERO);
        lease.moved();
        lease.moved();
        assert_eq!(heard(&endpoint), (1, 0, 0));
        lease.too_slow();
        assert_eq!(heard(&endpoint), (2, 1, 1));
    }

    #[test]
    fn no_deadline_of_a_caller_speaks_against_an_endpoint() {
        let long = Duration::from_secs(60);
        for set_by in [SetBy::GrpcTimeout, SetBy::Expected] {
            assert!(!blames(Some(set_by), long), "{set_by}");
        }
        assert!(blames(Some(SetBy::Route), Duration::from_millis(990)));
        assert!(!blames(Some(SetBy::Route), Duration::from_millis(900)));
        assert!(blames(None, long), "by its own word");
    }
}
