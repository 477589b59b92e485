//! A mesh in virtual time, out of one seed: callers with a proxy each, and servers that do what a script says.
//!
//! Whatever is decided here is decided by the code that decides in production; only sockets, clocks and chance are
//! played. Nothing here sleeps, and the same seed gives the same run to the last nanosecond.

use std::collections::BinaryHeap;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sheetbend_control_plane_client::model::Retry;
use sheetbend_proxy::telemetry::Counter;
use sheetbend_proxy::traffic::outlier::{self, Fault, Sent};
use sheetbend_proxy::traffic::retry::{Failure, Verdict};

use super::proxy::{Attempted, Proxy};
use super::record::{End, Record};
use super::script::{Caller, Conduct, Script};
use super::server::{Reply, Server};

/// One way between two neighbours.
const HOP: Duration = Duration::from_micros(100);
/// For a TCP connection within the mesh.
const CONNECT: Duration = Duration::from_secs(1);
/// A connection whose peer fell silent is given up after as long: a ping, and the wait for its answer.
const SILENCE: Duration = Duration::from_secs(20);

/// One request of a caller, through all of its attempts.
struct Call {
    proxy: usize,
    begun: Duration,
    idempotent: bool,
    /// Attempts before this one.
    before: u32,
    to: Attempted,
    /// Where its attempts went.
    tried: Vec<usize>,
    /// When this attempt began.
    sent: Duration,
    /// How often a server did what it asks for.
    effects: u32,
    retrying: bool,
    /// Between two attempts there is none.
    attempting: bool,
    over: bool,
}

enum Event {
    /// A caller has the next request.
    Asks(usize),
    /// An attempt reaches its server. The second number is that of the attempt.
    Comes(usize, u32),
    /// What came of an attempt reaches its proxy.
    Returns(usize, u32, Outcome),
    /// The wait before another attempt is over.
    Again(usize),
    /// A caller's patience ends.
    Leaves(usize),
    /// An attempt has taken as long as it may.
    TooLong(usize, u32),
    /// A server changes its ways.
    Becomes(usize, Conduct),
    /// The control plane names other endpoints.
    Push(Vec<usize>),
    /// A look at everybody, once a second.
    Look,
}

#[derive(Clone, Copy)]
enum Outcome {
    Status(u16),
    /// The connection broke after the request was sent.
    Reset,
    /// There was no connection.
    Unreached,
    /// It took too long.
    TimedOut,
}

/// How long the proxies have been up when a script begins: nothing may hang on a clock that starts with them.
const UPTIME: Duration = Duration::from_secs(30 * 24 * 3600);

/// An event's place: by time, then as they were planned, and last where it is kept. One number, since comparing those is
/// most of what a run does; turned over, since a heap gives the largest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Due(u128);

impl Due {
    const SLOT_BITS: u32 = 24;
    const PLANNED_BITS: u32 = 40;

    fn new(at: Duration, planned: u64, slot: usize) -> Self {
        assert!(slot < 1 << Self::SLOT_BITS && planned < 1 << Self::PLANNED_BITS, "a run is not as long");
        let nanos = at.as_nanos() << (Self::SLOT_BITS + Self::PLANNED_BITS);
        Self(!(nanos | u128::from(planned) << Self::SLOT_BITS | slot as u128))
    }

    fn at(self) -> Duration {
        Duration::from_nanos((!self.0 >> (Self::SLOT_BITS + Self::PLANNED_BITS)) as u64)
    }

    fn slot(self) -> usize {
        (!self.0 & ((1 << Self::SLOT_BITS) - 1)) as usize
    }
}

/// The mesh, and what has happened in it so far.
pub(crate) struct World {
    now: Duration,
    planned: u64,
    queue: BinaryHeap<Due>,
    events: Vec<Option<Event>>,
    free: Vec<usize>,
    chance: StdRng,
    callers: Vec<Caller>,
    proxies: Vec<Proxy>,
    servers: Vec<Server>,
    calls: Vec<Call>,
    record: Record,
    per_try: Option<Duration>,
    retry: Retry,
}

/// Plays a script from its beginning to its end.
pub(crate) fn play(script: &Script, seed: u64) -> Record {
    let mut world = World {
        now: UPTIME,
        planned: 0,
        queue: BinaryHeap::new(),
        events: Vec::new(),
        free: Vec::new(),
        chance: StdRng::seed_from_u64(seed),
        callers: script.callers.clone(),
        proxies: script.callers.iter().map(|_| Proxy::new(script.servers.len(), script)).collect(),
        servers: script.servers.iter().map(Server::new).collect(),
        calls: Vec::new(),
        record: Record::new(script.servers.len()),
        per_try: script.per_try,
        retry: script.retry.clone(),
    };
    for (at, servers) in &script.pushes {
        world.plan(UPTIME + *at, Event::Push(servers.clone()));
    }
    for second in 1..=script.lasts.as_secs() {
        world.plan(UPTIME + Duration::from_secs(second), Event::Look);
    }
    for (at, server, conduct) in &script.changes {
        world.plan(UPTIME + *at, Event::Becomes(*server, conduct.clone()));
    }
    for caller in 0..script.callers.len() {
        world.plan_next_call(caller);
    }
    while let Some(due) = world.queue.pop() {
        let (at, slot) = (due.at(), due.slot());
        world.now = at;
        let Some(event) = world.events[slot].take().inspect(|_| world.free.push(slot)) else { continue };
        // Callers stop at the end; what they have begun goes on until it is answered.
        if !matches!(event, Event::Asks(_)) || at < UPTIME + script.lasts {
            world.happens(event);
        }
    }
    world.record.nobody_left(&world.proxies);
    world.record
}

impl World {
    fn plan(&mut self, at: Duration, event: Event) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.events.push(None);
            self.events.len() - 1
        });
        self.events[slot] = Some(event);
        self.planned += 1;
        self.queue.push(Due::new(at, self.planned, slot));
    }

    fn plan_next_call(&mut self, caller: usize) {
        let even: f64 = self.chance.random_range(f64::MIN_POSITIVE..1.0);
        let wait = Duration::from_secs_f64(-even.ln() / self.callers[caller].rate);
        self.plan(self.now + wait, Event::Asks(caller));
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::Asks(caller) => {
                self.plan_next_call(caller);
                self.ask(caller);
            }
            Event::Comes(call, attempt) => self.comes(call, attempt),
            Event::Returns(call, attempt, outcome) if self.is_current(call, attempt) => self.returns(call, outcome),
            Event::Returns(..) => {}
            Event::Again(call) if !self.calls[call].over => {
                self.calls[call].before += 1;
                self.attempt(call);
            }
            Event::Again(_) => {}
            Event::Leaves(call) if !self.calls[call].over => self.end(call, End::CallerLeft),
            Event::Leaves(_) => {}
            Event::TooLong(call, attempt) if self.is_current(call, attempt) => self.returns(call, Outcome::TimedOut),
            Event::TooLong(..) => {}
            Event::Push(servers) => {
                self.proxies.iter_mut().for_each(|proxy| proxy.follow(servers.clone(), self.now));
                self.proxies.iter().for_each(|proxy| self.record.check_floor(self.now - UPTIME, proxy));
            }
            Event::Look => self.record.look(self.now, &self.proxies, &self.servers),
            Event::Becomes(server, conduct) => {
                for (call, attempt) in self.servers[server].becomes(conduct, self.now) {
                    self.plan(self.now + HOP, Event::Returns(call, attempt, Outcome::Reset));
                }
            }
        }
    }

    fn is_current(&self, call: usize, attempt: u32) -> bool {
        let call = &self.calls[call];
        !call.over && call.attempting && call.before == attempt
    }

    fn ask(&mut self, proxy: usize) {
        let caller = &self.callers[proxy];
        let idempotent = self.chance.random_bool(caller.idempotent);
        let (begun, id) = (self.now, self.calls.len());
        if let Some(patience) = caller.patience {
            self.plan(begun + patience, Event::Leaves(id));
        }
        let to = Attempted { server: usize::MAX, sent: Sent { probe: false, turn: 0, at: begun } };
        let (sent, retrying, attempting, over) = (begun, false, false, false);
        let tried = Vec::new();
        let call =
            Call { proxy, begun, idempotent, before: 0, to, tried, sent, effects: 0, retrying, attempting, over };
        self.calls.push(call);
        self.proxies[proxy].begin(self.now);
        self.attempt(id);
    }

    fn attempt(&mut self, id: usize) {
        let call = &mut self.calls[id];
        let to = self.proxies[call.proxy].pick(&call.tried, call.idempotent, &mut self.chance, self.now);
        (call.to, call.sent, call.attempting) = (to, self.now, true);
        call.tried.push(to.server);
        let (server, attempt) = (to.server, call.before);
        self.record.asked(server, self.now - UPTIME);
        if let Some(per_try) = self.per_try {
            self.plan(self.now + per_try, Event::TooLong(id, attempt));
        }
        match self.servers[server].conduct {
            Conduct::Refuses => self.plan(self.now + HOP * 2, Event::Returns(id, attempt, Outcome::Unreached)),
            Conduct::Silent { since } if self.now >= UPTIME + since + SILENCE => {
                self.plan(self.now + CONNECT, Event::Returns(id, attempt, Outcome::Unreached));
            }
            // Into a connection that nobody knows yet to be dead.
            Conduct::Silent { since } => {
                self.plan(UPTIME + since + SILENCE, Event::Returns(id, attempt, Outcome::Reset))
            }
            _ => self.plan(self.now + HOP, Event::Comes(id, attempt)),
        }
    }

    fn comes(&mut self, id: usize, attempt: u32) {
        let call = &mut self.calls[id];
        self.record.reached(call.to.server, self.now - UPTIME);
        let server = &mut self.servers[call.to.server];
        let reply = server.take(id, attempt, self.now, &mut self.chance);
        if reply.has_effect() {
            call.effects += 1;
        }
        if call.effects > 1 && !call.idempotent {
            self.record.wrong(format!("request {id}, not idempotent, had {} effects", call.effects));
        }
        match reply {
            Reply::Answer { after, status, .. } => {
                self.plan(self.now + after + HOP, Event::Returns(id, attempt, Outcome::Status(status)));
            }
            Reply::Reset { after } => self.plan(self.now + after + HOP, Event::Returns(id, attempt, Outcome::Reset)),
            Reply::Nothing => {}
        }
    }

    fn returns(&mut self, id: usize, outcome: Outcome) {
        let call = &mut self.calls[id];
        let proxy = &mut self.proxies[call.proxy];
        let failure = match outcome {
            Outcome::Status(status) => {
                match status {
                    500.. => proxy.failed(call.to.server, self.now),
                    _ => proxy.answered(call.to.server, self.now - call.sent, self.now),
                }
                (status >= 500).then_some(Failure::Status { status, retry_after: None })
            }
            Outcome::Reset => {
                proxy.failed(call.to.server, self.now);
                Some(Failure::Reset)
            }
            Outcome::TimedOut => {
                proxy.failed(call.to.server, self.now);
                Some(Failure::TooSlow)
            }
            Outcome::Unreached => {
                proxy.failed(call.to.server, self.now);
                Some(Failure::Unprocessed(Counter::RetriedConnect))
            }
        };
        let seen = match outcome {
            Outcome::Status(..500) => outlier::Outcome::Good,
            Outcome::Status(_) => outlier::Outcome::Bad(Fault::Gateway),
            _ => outlier::Outcome::Bad(Fault::LocalOrigin),
        };
        self.end_attempt(id, seen);
        let call = &mut self.calls[id];
        let proxy = &mut self.proxies[call.proxy];
        let verdict = failure.map(|failure| {
            let chance = self.chance.random_range(0.0..1.0);
            proxy.again(&self.retry, failure, call.before, call.idempotent, chance, self.now)
        });
        if let Some(Verdict::Retry { after, .. }) = verdict {
            self.record.retried(proxy);
            proxy.end_retry(std::mem::replace(&mut call.retrying, true));
            return self.plan(self.now + after, Event::Again(id));
        }
        self.end(
            id,
            match outcome {
                Outcome::Status(status) => End::Status(status),
                Outcome::Reset => End::Reset,
                Outcome::Unreached => End::Unreached,
                Outcome::TimedOut => End::TimedOut,
            },
        );
    }

    fn end_attempt(&mut self, id: usize, outcome: outlier::Outcome) {
        let call = &mut self.calls[id];
        if std::mem::take(&mut call.attempting) {
            let proxy = &mut self.proxies[call.proxy];
            let ejected = proxy.report(call.to, outcome, self.chance.random(), self.now);
            if ejected.is_some() {
                self.record.ejected(call.to.server, self.now - UPTIME, proxy);
            }
        }
    }

    fn end(&mut self, id: usize, end: End) {
        let call = &self.calls[id];
        if call.attempting {
            self.proxies[call.proxy].abandoned(call.to.server, self.now - call.sent, self.now);
        }
        self.end_attempt(id, outlier::Outcome::Unknown);
        let call = &mut self.calls[id];
        call.over = true;
        let proxy = &mut self.proxies[call.proxy];
        proxy.end_retry(call.retrying);
        proxy.end();
        if call.before > self.retry.attempts() {
            self.record.wrong(format!("request {id} was retried {} times", call.before));
        }
        self.record.ended(call.begun - UPTIME, self.now - UPTIME, call.before + 1, end);
    }
}
