//! One proxy's decisions, all of them made by the code that makes them in production.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use sheetbend_control_plane_client::model::{LoadBalancer, Retry};
use sheetbend_proxy::traffic::balance::Member;
use sheetbend_proxy::traffic::choice::Choice;
use sheetbend_proxy::traffic::outlier::{Detection, Floor, Outcome, Reason, Sent, State, Vitals};
use sheetbend_proxy::traffic::retry::{self, Attempt, Budget, Failure, Verdict};

use super::script::{Script, Standing};

pub(crate) struct Proxy {
    /// What is known of each server, whether it is an endpoint now or not.
    known: Vec<Arc<Vitals>>,
    /// The servers that are endpoints now.
    servers: Vec<usize>,
    floor: Floor,
    detection: Detection,
    balancer: LoadBalancer,
    /// Of each server.
    standings: Vec<Standing>,
    choice: Choice,
    pub(crate) budget: Budget,
    pub(crate) retrying: u64,
    /// Requests and retries of each second that had any, for whoever doubts the budget.
    seconds: VecDeque<(u64, u64, u64)>,
}

/// Where an attempt goes.
#[derive(Clone, Copy)]
pub(crate) struct Attempted {
    pub(crate) server: usize,
    pub(crate) sent: Sent,
}

impl Proxy {
    pub(crate) fn new(servers: usize, script: &Script) -> Self {
        let detection = match script.ejects {
            true => Detection::default(),
            false => Detection { errors: 0, success_rate: 0.0, ..Detection::default() },
        };
        let mut proxy = Self {
            known: (0..servers).map(|_| Arc::default()).collect(),
            servers: Vec::new(),
            floor: Floor::default(),
            detection,
            choice: Choice::default(),
            standings: script.standings.clone(),
            balancer: script.balancer.clone(),
            budget: Budget::default(),
            retrying: 0,
            seconds: VecDeque::new(),
        };
        proxy.follow((0..servers).collect(), Duration::ZERO);
        proxy
    }

    /// The control plane says that these are the endpoints.
    pub(crate) fn follow(&mut self, servers: Vec<usize>, now: Duration) {
        let endpoints = servers.iter().map(|server| Arc::clone(&self.known[*server])).collect();
        let standing = |server: usize| self.standings.get(server).copied().unwrap_or_default();
        let mut levels: BTreeMap<u32, Vec<Member>> = BTreeMap::new();
        for (number, server) in (0..).zip(&servers) {
            let address = ([127, 0, (server >> 8) as u8, *server as u8], 80).into();
            let Standing { priority, weight } = standing(*server);
            levels.entry(priority).or_default().push(Member { number, address, weight });
        }
        // Any row will do, as long as it is the same one each time that a seed is played.
        let mut chance = 0u64;
        let chance = move || {
            chance = chance.wrapping_add(0x9e37_79b9_7f4a_7c15);
            chance
        };
        self.choice = Choice::new(endpoints, levels.into_values().collect(), &self.balancer, chance);
        self.servers = servers;
        self.floor.follow(self.choice.vitals(), &self.detection, now, || true);
    }

    /// A request begins.
    pub(crate) fn begin(&mut self, now: Duration) {
        self.budget.begin(now);
        self.second(now).1 += 1;
    }

    fn second(&mut self, now: Duration) -> &mut (u64, u64, u64) {
        /// The budget's interval, in seconds.
        const INTERVAL: u64 = 10;
        let second = now.as_secs();
        if self.seconds.back().is_none_or(|last| last.0 < second) {
            self.seconds.push_back((second, 0, 0));
            self.seconds.retain(|known| known.0 + INTERVAL > second);
        }
        self.seconds.back_mut().expect("a second was pushed")
    }

    /// Requests and retries that the budget counts at this moment.
    pub(crate) fn recent(&self) -> (u64, u64) {
        self.seconds.iter().fold((0, 0), |sum, second| (sum.0 + second.1, sum.1 + second.2))
    }

    /// It has ended.
    pub(crate) fn end(&mut self) {
        self.budget.end();
    }

    /// An attempt begins, at another server than those tried before.
    pub(crate) fn pick(&mut self, tried: &[usize], idempotent: bool, chance: &mut StdRng, now: Duration) -> Attempted {
        let endpoints = self.choice.vitals();
        let was_tried = |at: usize| tried.contains(&self.servers[at]);
        let choose = || self.choice.pick(None, was_tried, now, || chance.random());
        let picked = self.floor.pick(endpoints, idempotent && tried.is_empty(), now, choose);
        let picked = picked.expect("a script has servers");
        endpoints[picked.at].load.begin();
        let turn = endpoints[picked.at].turns();
        Attempted { server: self.servers[picked.at], sent: Sent { probe: picked.probe, turn, at: now } }
    }

    /// The head of an answer came.
    pub(crate) fn answered(&mut self, server: usize, after: Duration, now: Duration) {
        self.known[server].load.sample(after, now);
    }

    /// Somebody gave up waiting for one.
    pub(crate) fn abandoned(&mut self, server: usize, after: Duration, now: Duration) {
        self.known[server].load.longer_than(after, now);
    }

    pub(crate) fn failed(&mut self, server: usize, now: Duration) {
        self.known[server].load.failed(now);
    }

    /// An attempt has ended.
    pub(crate) fn report(&mut self, of: Attempted, outcome: Outcome, chance: f64, now: Duration) -> Option<Reason> {
        let vitals = &self.known[of.server];
        vitals.load.end();
        self.floor.report(vitals, of.sent, outcome, now, || chance)
    }

    pub(crate) fn again(
        &mut self,
        policy: &Retry,
        failure: Failure,
        before: u32,
        idempotent: bool,
        chance: f64,
        now: Duration,
    ) -> Verdict {
        let attempt = Attempt {
            policy,
            failure,
            before,
            idempotent,
            replayable: true,
            caller_retries: false,
            in_vain: false,
            left: None,
        };
        let verdict = retry::decide(&attempt, chance, || self.budget.take(now));
        let retries = u64::from(matches!(verdict, Verdict::Retry { .. }));
        self.retrying += retries;
        self.second(now).2 += retries;
        verdict
    }

    pub(crate) fn end_retry(&mut self, retrying: bool) {
        if retrying {
            self.retrying -= 1;
            self.budget.retried();
        }
    }

    pub(crate) fn in_flight(&self) -> u32 {
        self.known.iter().map(|vitals| vitals.load.in_flight()).sum()
    }

    /// How many endpoints there are, and how many of them are in use.
    pub(crate) fn in_use(&self) -> (usize, usize) {
        let endpoints = self.choice.vitals();
        let in_use = endpoints.iter().filter(|vitals| !matches!(vitals.state(), State::Ejected { .. })).count();
        (endpoints.len(), in_use)
    }

    pub(crate) fn state(&self, server: usize) -> State {
        self.known[server].state()
    }

    /// Requests to a server that ended within its window.
    pub(crate) fn seen(&self, server: usize, now: Duration) -> u32 {
        self.known[server].recent(self.detection.interval, now).0
    }
}
