//! What all workers share, in the hands of real threads: a simulation has but one.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::super::Fault;
use super::*;

const BAD: Outcome = Outcome::Bad(Fault::Gateway);

/// What workers, checks, an operator and the control plane do, all at once.
struct Crowd {
    floor: Floor,
    all: Vec<Arc<Vitals>>,
    /// The clock goes on a little with everything that is done.
    clock: AtomicU64,
}

impl Crowd {
    fn of(n: usize) -> Self {
        let all: Vec<Arc<Vitals>> = (0..n).map(|_| Arc::default()).collect();
        // In two levels, the first of which may be the smaller one.
        all[n.div_ceil(3)..].iter().for_each(|vitals| vitals.put_into(1));
        let crowd = Self { floor: Floor::default(), all, clock: AtomicU64::new(1) };
        crowd.follow(n);
        crowd
    }

    fn now(&self) -> Duration {
        Duration::from_millis(self.clock.fetch_add(1, Relaxed))
    }

    /// The first so many are the endpoints from now on.
    fn follow(&self, n: usize) {
        let members: Arc<[_]> = self.all[..n].iter().cloned().collect();
        self.floor.follow(&members, &Detection::DEFAULT, self.now(), || true);
    }

    /// A request to whoever is picked, and what came of it.
    fn request(&self, chance: &mut StdRng, fails: impl Fn(usize) -> bool) -> Picked {
        let now = self.now();
        let n = self.all.len();
        let retryable = chance.random();
        let choose = || {
            let from = chance.random_range(0..n);
            let good = |at: &usize| self.all[*at].admits(chance.random(), now);
            (from..n).chain(0..from).find(good).or(Some(from))
        };
        let picked = self.floor.pick(&self.all, retryable, now, choose).unwrap();
        let vitals = &self.all[picked.at];
        let sent = Sent { probe: picked.probe, turn: vitals.turns(), at: now };
        let outcome = match chance.random_range(0..20) {
            0 => Outcome::Unknown,
            _ if fails(picked.at) => BAD,
            _ => Outcome::Good,
        };
        self.floor.report(vitals, sent, outcome, self.now(), || 0.5);
        picked
    }

    /// Whether enough are in use, and as many are out as are counted: looked at while nobody may turn.
    fn check(&self) {
        let turning = self.floor.lock();
        let n = turning.members.len();
        let out = turning.members.iter().filter(|vitals| matches!(vitals.state(), State::Ejected { .. })).count();
        let counted = turning.ejected.iter().filter(|vitals| vitals.present.load(Relaxed)).count();
        assert!(n - out >= n.div_ceil(2).max(1), "{out} of {n} are ejected");
        assert_eq!(out, counted);
    }
}

/// Runs until each thread has done so much, with somebody who looks on meanwhile.
fn all_at_once(threads: u64, times: usize, work: impl Fn(&mut StdRng, usize) + Sync, look: impl Fn() + Sync) {
    let left = AtomicUsize::new(threads as usize);
    std::thread::scope(|scope| {
        for seed in 0..threads {
            let (work, left) = (&work, &left);
            scope.spawn(move || {
                let mut chance = StdRng::seed_from_u64(seed);
                (0..times).for_each(|time| work(&mut chance, time));
                left.fetch_sub(1, Relaxed);
            });
        }
        while left.load(Relaxed) > 0 {
            look();
            std::thread::yield_now();
        }
    });
    look();
}

#[test]
fn half_are_in_use_at_every_moment_whatever_workers_checks_operators_and_pushes_do() {
    for n in [1, 2, 3, 5, 8] {
        let crowd = Crowd::of(n);
        let work = |chance: &mut StdRng, _| {
            let at = chance.random_range(0..n);
            let (vitals, now) = (&crowd.all[at], crowd.now());
            match chance.random_range(0..100) {
                0 => crowd.follow(chance.random_range(1..=n)),
                1 => drop(crowd.floor.eject_by_hand(vitals, Duration::from_millis(chance.random_range(1..50)), now)),
                2 => crowd.floor.restore_by_hand(vitals, Duration::ZERO, now),
                3 | 4 => crowd.floor.checked(vitals, chance.random(), now),
                // Different ones fail at different times, all of them some day.
                _ => drop(crowd.request(chance, |at| (now.as_millis() as usize / 500 + at).is_multiple_of(n.max(2)))),
            }
        };
        all_at_once(4, 10_000, work, || crowd.check());
        let tally = crowd.floor.tally();
        assert!(n == 1 || tally.ejections.iter().sum::<u64>() > 0, "{n}: {tally:?}");
    }
}

/// Where one of ten may be ejected, four workers see four of them fail at the same moment.
#[test]
fn of_those_that_fail_at_once_no_more_are_ejected_than_may_be() {
    const ROUNDS: u64 = 2_000;
    let crowd = Crowd::of(10);
    let one = Detection { max_ejection_percent: 10, ..Detection::DEFAULT };
    crowd.floor.follow(&crowd.all.clone().into(), &one, Duration::ZERO, || true);
    let together = std::sync::Barrier::new(4);
    let (ejected, others) = (AtomicU64::new(0), AtomicU64::new(0));
    let worker = |at: usize| {
        let vitals = &crowd.all[at];
        for round in 1..=ROUNDS {
            let now = Duration::from_secs(100 * round);
            together.wait();
            for _ in 0..one.errors {
                let sent = Sent { probe: false, turn: vitals.turns(), at: now };
                let reason = crowd.floor.report(vitals, sent, BAD, now, || 0.5);
                ejected.fetch_add(u64::from(reason.is_some()), Relaxed);
            }
            together.wait();
            // Not asserted here: the others would wait for ever.
            others.fetch_add(u64::from(crowd.floor.ejected() != (1, 1)), Relaxed);
            together.wait();
            crowd.floor.restore_by_hand(vitals, Duration::ZERO, now);
        }
    };
    std::thread::scope(|scope| {
        let worker = &worker;
        (0..4).for_each(|at| drop(scope.spawn(move || worker(at))));
    });
    assert_eq!((ejected.into_inner(), others.into_inner()), (ROUNDS, 0));
}

#[test]
fn no_two_requests_try_an_endpoint_at_once_and_none_is_sent_to_one_that_stays_ejected() {
    let crowd = Crowd::of(2);
    let out = &crowd.all[0];
    crowd.floor.eject_by_hand(out, Duration::from_secs(1), Duration::ZERO).unwrap();
    let (trying, twice, early) = (AtomicUsize::new(0), AtomicBool::new(false), AtomicBool::new(false));
    let work = |chance: &mut StdRng, time| {
        let now = if time < 1_000 { Duration::from_millis(999) } else { Duration::from_secs(3_600) };
        let pick = || crowd.floor.pick(&crowd.all, true, now, || Some(1)).unwrap();
        let picked = pick();
        early.fetch_or(time < 1_000 && picked.at == 0, Relaxed);
        if picked.probe {
            let turn = crowd.all[picked.at].turns();
            twice.fetch_or(trying.fetch_add(1, Relaxed) > 0, Relaxed);
            std::thread::yield_now();
            trying.fetch_sub(1, Relaxed);
            let sent = Sent { probe: true, turn, at: now };
            let outcome = if chance.random() { Outcome::Unknown } else { BAD };
            crowd.floor.report(&crowd.all[picked.at], sent, outcome, now - Duration::from_secs(120), || 0.5);
        }
    };
    // Nobody is allowed ahead of the others: half of them would be in another time.
    let barrier = std::sync::Barrier::new(4);
    let work = |chance: &mut StdRng, time| {
        if time == 1_000 {
            barrier.wait();
        }
        work(chance, time);
    };
    all_at_once(4, 11_000, work, || crowd.check());
    assert!(!twice.into_inner(), "two at once");
    assert!(!early.into_inner(), "it was ejected still");
    assert!(out.turns() > 100, "it was tried {} times", out.turns());
}

#[test]
fn while_somebody_is_in_doubt_requests_that_ask_nobody_on_purpose_take_no_lock() {
    let crowd = Crowd::of(40);
    let now = crowd.now();
    let sent = Sent { probe: false, turn: 0, at: now };
    crowd.floor.report(&crowd.all[0], sent, BAD, now, || 0.5);
    let pick = || crowd.floor.pick(&crowd.all, true, now, || Some(1)).unwrap();
    let pass = |picks: usize| {
        let (done, is_done) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let held = crowd.floor.lock();
            scope.spawn(move || done.send((0..picks).all(|_| !pick().probe)));
            let passed = is_done.recv_timeout(Duration::from_secs(30));
            drop(held);
            passed
        })
    };
    assert_eq!(pass(20), Ok(true), "half as many as there are go elsewhere");
    assert_eq!(pick(), Picked { at: 0, probe: true });
    assert_eq!(pass(100), Ok(true), "one at a time");
}
