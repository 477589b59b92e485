//! The whole judgement of the proxies, played in virtual time from thousands of seeds.
//!
//! What hangs is ejected where a route says how long an attempt may take, and only there: nothing else tells it from an
//! endpoint that holds its answers back for good reasons. Without such a timeout it draws in no more than the others.
//!
//! A seed that fails is printed. `SHEETBEND_SEED=N` plays that one alone, `SHEETBEND_SEEDS=N` as many as one likes.

mod levels;
mod proxy;
mod record;
mod script;
mod seeds;
mod server;
mod world;

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use rand::RngExt;
use script::{Caller, Conduct, Script, Standing};
use seeds::for_each_seed;
use sheetbend_control_plane_client::model::{ConsistentHash, LoadBalancer, Retry, RetryOn, Simple};
use world::play;

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn of(servers: Vec<Conduct>, callers: Vec<Caller>, lasts: Duration) -> Script {
    let (retry, balancer) = (Retry::DEFAULT, LoadBalancer::default());
    Script {
        servers,
        standings: Vec::new(),
        callers,
        changes: Vec::new(),
        pushes: Vec::new(),
        per_try: None,
        retry,
        ejects: true,
        balancer,
        lasts,
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for_each_seed(20, |seed, chance| {
        let script = anything(chance);
        let same = play(&script, seed) == play(&script, seed);
        same.then_some(()).ok_or_else(|| format!("two runs differ: {script:?}"))
    });
}

#[test]
fn whatever_happens_nothing_is_paid_twice_no_budget_is_exceeded_and_nothing_stays_counted() {
    for_each_seed(2_000, |seed, chance| play(&anything(chance), seed).check());
}

#[test]
fn in_a_total_outage_retries_add_a_fifth_and_ten_a_second_at_most() {
    for_each_seed(100, |seed, chance| {
        let rate = chance.random_range(5.0..500.0);
        let bad = [Conduct::failing(1.0), Conduct::Refuses, Conduct::Resets][chance.random_range(0..3)].clone();
        let servers = chance.random_range(1..8);
        let mut script = of(vec![bad; servers], vec![Caller::at(rate)], secs(20));
        if chance.random() {
            script.retry = policy(chance);
        }
        // One more could not exceed what is allowed at a low rate.
        script.retry.attempts = Some(chance.random_range(2..=4));
        let record = play(&script, seed);
        let (load, most) = (record.attempts(secs(0)..secs(20)), 1.0 + 0.2 + 10.0 / rate);
        // Arrivals are random: in 20 s their number is off by this much in one run of a million.
        let noise = 5.0 / (rate * 20.0).sqrt();
        (load <= most * (1.0 + noise))
            .then_some(())
            .ok_or(format!("{load:.3} attempts a call at {rate:.0}/s, {most:.3} are the most"))?;
        record.check()
    });
}

#[test]
fn one_slow_endpoint_of_three_leaves_the_p99_of_all_within_twice_the_healthy_one() {
    for_each_seed(30, |seed, chance| {
        let callers = vec![Caller::at(chance.random_range(100.0..400.0))];
        let after = secs(1)..secs(30);
        let healthy = play(&of(vec![Conduct::good(); 3], callers.clone(), secs(30)), seed);
        let servers = vec![Conduct::slower(10), Conduct::good(), Conduct::good()];
        let one_slow = play(&of(servers, callers, secs(30)), seed);
        let (healthy, slow) = (healthy.quantile(0.99, after.clone()), one_slow.quantile(0.99, after));
        (slow <= healthy * 2).then_some(()).ok_or(format!("p99 {slow:?}, healthy {healthy:?}"))
    });
}

#[test]
fn of_equal_endpoints_none_starves_and_none_carries_twice_its_share() {
    for_each_seed(20, |seed, chance| {
        let servers = chance.random_range(2..9);
        let record = play(&of(vec![Conduct::good(); servers], vec![Caller::at(1_000.0)], secs(11)), seed);
        let loads = record.loads(secs(1)..secs(11));
        let mean = loads.iter().sum::<usize>() / servers;
        // The peak of an endpoint that was slow once keeps some away from it for seconds: alike is not the same.
        let alike = loads.iter().all(|load| (mean / 2..mean * 2).contains(load));
        alike.then_some(()).ok_or(format!("{loads:?}"))
    });
}

#[test]
fn with_one_of_five_endpoints_failing_hardly_any_caller_notices_after_the_first_second() {
    let gone = Conduct::Silent { since: Duration::ZERO };
    let ways = [Conduct::failing(1.0), Conduct::failing(0.5), Conduct::Hangs, gone, Conduct::Resets, Conduct::Refuses];
    for_each_seed(40, |seed, chance| {
        let bad = ways[chance.random_range(0..ways.len())].clone();
        let mut servers = vec![Conduct::good(); 5];
        servers[chance.random_range(0..5)] = bad.clone();
        let callers = vec![Caller::at(chance.random_range(50.0..500.0))];
        let mut script = of(servers, callers, secs(61));
        // What hangs is noticed by whoever has said how long an attempt may take.
        script.per_try = Some(Duration::from_millis(250));
        let record = play(&script, seed);
        let success = record.success(secs(1)..secs(61));
        (success >= 0.999).then_some(()).ok_or(format!("{success:.5} with {bad:?}"))?;
        record.check()
    });
}

#[test]
fn an_endpoint_that_recovers_has_its_traffic_back_within_two_ejections_and_no_stampede() {
    let (back, all) = (AtomicUsize::new(0), AtomicUsize::new(0));
    for_each_seed(200, |seed, chance| {
        let rate = chance.random_range(100.0..1000.0);
        let mut script = of(vec![Conduct::good(); 5], vec![Caller::at(rate)], secs(20));
        script.servers[0] =
            [Conduct::Resets, Conduct::Refuses, Conduct::failing(1.0)][chance.random_range(0..3)].clone();
        // It was ejected for 1 s at most, failed again, and is away for 2 s at most.
        let recovers = Duration::from_millis(1_500);
        script.changes.push((recovers, 0, Conduct::good()));
        let record = play(&script, seed);
        let loads = record.loads(recovers + secs(4)..secs(20));
        back.fetch_add(loads[0], Relaxed);
        all.fetch_add(loads.iter().sum(), Relaxed);
        let first = (0..40).map(|at| recovers + Duration::from_millis(100) * at);
        let most = first.map(|at| record.loads(at..at + secs(1))[0]).max().unwrap_or(0) as f64;
        let usual = rate / 5.0;
        (most <= usual * 2.0 + 5.0 * usual.sqrt())
            .then_some(())
            .ok_or(format!("{most} in a second, {usual:.0} is usual"))?;
        record.check()
    });
    let (back, all) = (back.into_inner() as f64, all.into_inner() as f64);
    assert!(back * 5.0 >= all * 0.99, "{:.4} of the usual traffic", back * 5.0 / all);
}

#[test]
fn verdicts_are_right_of_the_good_and_of_the_bad() {
    // Over all seeds: there are few of the bad ones, since hardly anything is sent to whoever is ejected.
    let counted = [(); 4].map(|()| AtomicUsize::new(0));
    for_each_seed(40, |seed, chance| {
        let rate = chance.random_range(100.0..1000.0);
        let n = chance.random_range(3..10);
        let mut script = of(vec![Conduct::good(); n], vec![Caller::at(rate)], secs(60));
        script.per_try = Some(Duration::from_millis(250));
        for at in 0..chance.random_range(1..=(n - 1) / 2) {
            // Each becomes bad and good again as often as it likes.
            let (mut now, mut good) = (Duration::ZERO, chance.random());
            while now < secs(60) {
                let bad = [Conduct::failing(0.5), Conduct::failing(1.0), Conduct::Resets, Conduct::Hangs];
                let how = if good { Conduct::good() } else { bad[chance.random_range(0..4)].clone() };
                script.changes.push((now, at, how));
                now += chance.random_range(secs(3)..secs(40));
                good = !good;
            }
        }
        let record = play(&script, seed);
        let [bad, good] = record.verdicts();
        counted.iter().zip([bad.0, bad.1, good.0, good.1]).for_each(|(count, more)| {
            count.fetch_add(more, Relaxed);
        });
        record.check()
    });
    let [bad, missed, good, blamed] = counted.map(AtomicUsize::into_inner);
    assert!(bad > 0 && missed * 100 <= bad, "{missed} of {bad} verdicts on bad ones are wrong");
    assert!(good > 0 && blamed * 100 <= good, "{blamed} of {good} verdicts on good ones are wrong");
}

#[test]
fn an_endpoint_that_starts_to_fail_is_ejected_within_two_seconds_however_the_balancer_avoids_it() {
    let (runs, unasked) = (AtomicUsize::new(0), AtomicUsize::new(0));
    for_each_seed(60, |seed, chance| {
        let n = chance.random_range(2..8);
        let mut script = of(vec![Conduct::good(); n], vec![Caller::at(chance.random_range(50.0..500.0))], secs(60));
        // Its first answers were slow: connections had to be made, caches to be filled.
        script.servers[0] = Conduct::slower(chance.random_range(1..40));
        script.changes.push((Duration::from_millis(200), 0, Conduct::good()));
        let fails = chance.random_range(secs(1)..secs(20));
        let how = [Conduct::failing(1.0), Conduct::Resets, Conduct::Refuses][chance.random_range(0..3)].clone();
        script.changes.push((fails, 0, how.clone()));
        let record = play(&script, seed);
        runs.fetch_add(1, Relaxed);
        let Some(asked) = record.first_asked(0, fails) else {
            unasked.fetch_add(1, Relaxed);
            return Ok(());
        };
        let ejected = record.ejections_of(0, asked..asked + secs(2));
        (ejected > 0).then_some(()).ok_or(format!("asked at {asked:?}, {how:?}, one of {n}"))?;
        record.check()
    });
    let (runs, unasked) = (runs.into_inner(), unasked.into_inner());
    assert!(unasked * 20 <= runs, "{unasked} of {runs} were never asked");
}

#[test]
fn a_common_cause_ejects_nobody() {
    for_each_seed(50, |seed, chance| {
        let n = chance.random_range(2..10);
        let mut script = of(vec![Conduct::good(); n], vec![Caller::at(chance.random_range(50.0..1000.0))], secs(30));
        let bad = [Conduct::failing(1.0), Conduct::Resets, Conduct::Refuses][chance.random_range(0..3)].clone();
        script.changes.extend((0..n).map(|at| (secs(10), at, bad.clone())));
        let record = play(&script, seed);
        let ejections = record.ejections(secs(0)..secs(30));
        (ejections == 0).then_some(()).ok_or(format!("{ejections} ejections of {n}"))?;
        record.check()
    });
}

#[test]
fn however_many_fail_callers_fare_no_worse_than_by_chance() {
    for_each_seed(40, |seed, chance| {
        let n = chance.random_range(2..7);
        let bad = chance.random_range(1..n);
        let mut script = of(vec![Conduct::good(); n], vec![Caller::at(chance.random_range(50.0..300.0))], secs(60));
        let how = [Conduct::failing(1.0), Conduct::Resets, Conduct::Refuses][chance.random_range(0..3)].clone();
        script.changes.extend((0..bad).map(|at| (secs(5), at, how.clone())));
        let record = play(&script, seed);
        let (success, by_chance) = (record.success(secs(10)..secs(60)), (n - bad) as f64 / n as f64);
        (success >= by_chance).then_some(()).ok_or(format!("{success:.3} with {bad} of {n} {how:?}"))?;
        record.check()
    });
}

/// No route says how long an attempt may take: nobody declares it ejected, and hardly anything is sent there.
#[test]
fn an_endpoint_that_hangs_draws_in_no_more_than_the_others() {
    for_each_seed(20, |seed, chance| {
        let caller = Caller { patience: Some(secs(1)), ..Caller::at(chance.random_range(50.0..200.0)) };
        let mut script = of(vec![Conduct::good(); 5], vec![caller], secs(90));
        script.changes.push((secs(5), 0, Conduct::Hangs));
        let record = play(&script, seed);
        let late = record.success(secs(40)..secs(90));
        (late >= 0.97).then_some(()).ok_or(format!("{late:.3} in the end"))
    });
}

#[test]
fn a_newcomer_that_is_slow_at_first_is_not_buried() {
    for_each_seed(20, |seed, chance| {
        let rate = chance.random_range(200.0..1000.0);
        let mut script = of(vec![Conduct::good(); 5], vec![Caller::at(rate)], secs(20));
        script.pushes = vec![(Duration::ZERO, vec![0, 1, 2, 3]), (secs(10), vec![0, 1, 2, 3, 4])];
        script.servers[4] = Conduct::slower(400);
        let record = play(&script, seed);
        let (all, late) = (record.loads(secs(10)..secs(12)), record.quantile(0.99, secs(11)..secs(20)));
        let share = all[4] as f64 / all.iter().sum::<usize>() as f64;
        (share <= 0.02 && late <= secs(1)).then_some(()).ok_or(format!("{share:.3} of all, p99 {late:?}"))
    });
}

#[test]
fn errors_of_a_common_cause_that_are_few_eject_hardly_anybody() {
    let (ejected, endpoints) = (AtomicUsize::new(0), AtomicUsize::new(0));
    for_each_seed(40, |seed, chance| {
        let n = chance.random_range(4..11);
        let errors = chance.random_range(0.15..0.35);
        let mut script = of(vec![Conduct::good(); n], vec![Caller::at(chance.random_range(100.0..500.0))], secs(45));
        script.changes.extend((0..n).map(|at| (secs(5), at, Conduct::failing(errors))));
        let record = play(&script, seed);
        let ejections = record.ejections(secs(0)..secs(45));
        ejected.fetch_add(ejections, Relaxed);
        endpoints.fetch_add(n, Relaxed);
        (ejections <= n).then_some(()).ok_or(format!("{ejections} ejections of {n} at {errors:.2}"))
    });
    // One of them may be unlucky while it is not known yet that the others are, too.
    let (ejected, endpoints) = (ejected.into_inner(), endpoints.into_inner());
    assert!(ejected * 10 <= endpoints, "{ejected} ejections of {endpoints}");
}

/// Whatever a route may ask for, but for sending twice what may have been processed.
fn policy(chance: &mut rand::rngs::StdRng) -> Retry {
    let codes = [429, 500, 501, 503].into_iter().filter(|_| chance.random()).collect();
    Retry {
        attempts: chance.random_bool(0.8).then(|| chance.random_range(0..=4)),
        codes,
        backoff: chance.random_bool(0.3).then(|| chance.random_range(secs(0)..secs(1))),
        on: if chance.random() { vec![RetryOn::ServerError] } else { Vec::new() },
        non_idempotent: false,
    }
}

fn simple(simple: Simple) -> LoadBalancer {
    LoadBalancer { simple: Some(simple), ..LoadBalancer::default() }
}

#[test]
fn by_least_request_and_by_turns_the_busiest_of_equal_endpoints_has_a_tenth_more_than_the_mean_at_most() {
    for_each_seed(40, |seed, chance| {
        let n = chance.random_range(2..60);
        let callers = vec![Caller::at(chance.random_range(1_000.0..2_000.0))];
        for kind in [Simple::LeastRequest, Simple::RoundRobin] {
            let mut script = of(vec![Conduct::good(); n], callers.clone(), secs(11));
            script.balancer = simple(kind);
            let loads = play(&script, seed).loads(secs(1)..secs(11));
            let mean = loads.iter().sum::<usize>() as f64 / n as f64;
            let busiest = loads.into_iter().max().unwrap_or(0) as f64;
            // Whole requests: one more is more than a tenth of a few.
            if busiest > (mean * 1.1).ceil() {
                return Err(format!("{kind:?}: the busiest of {n} has {busiest}, the mean is {mean}"));
            }
        }
        Ok(())
    });
}

#[test]
fn with_one_slow_endpoint_calls_take_the_least_time_by_peak_ewma() {
    for_each_seed(40, |seed, chance| {
        let mut servers = vec![Conduct::good(); chance.random_range(3..10)];
        servers[0] = Conduct::slower(chance.random_range(5..20));
        let callers = vec![Caller::at(chance.random_range(100.0..1_000.0))];
        let mean = |balancer| {
            let script = Script { balancer, ..of(servers.clone(), callers.clone(), secs(21)) };
            play(&script, seed).mean(secs(1)..secs(21))
        };
        let ours = mean(simple(Simple::PeakEwma));
        let hash = ConsistentHash { use_source_ip: Some(true), ..ConsistentHash::default() };
        let ring = LoadBalancer { consistent_hash: Some(hash), ..LoadBalancer::default() };
        let kinds = [Simple::LeastRequest, Simple::RoundRobin, Simple::Random].map(simple);
        for other in kinds.into_iter().chain([ring]) {
            let theirs = mean(other.clone());
            if theirs <= ours {
                return Err(format!("{theirs:?} by {other:?}, {ours:?} by peak EWMA"));
            }
        }
        Ok(())
    });
}

/// Anything that can happen.
fn anything(chance: &mut rand::rngs::StdRng) -> Script {
    let conduct = |chance: &mut rand::rngs::StdRng, now| match chance.random_range(0..9) {
        0 => Conduct::Resets,
        1 => Conduct::Refuses,
        2 => Conduct::Hangs,
        3 => Conduct::Silent { since: now },
        4 => Conduct::failing(chance.random()),
        5 => Conduct::slower(chance.random_range(2..50)),
        _ => Conduct::good(),
    };
    let servers = (0..chance.random_range(1..8)).map(|_| conduct(chance, Duration::ZERO)).collect::<Vec<_>>();
    let callers = (0..chance.random_range(1..4)).map(|_| Caller {
        rate: chance.random_range(1.0..100.0),
        idempotent: chance.random(),
        patience: chance.random_bool(0.7).then(|| chance.random_range(secs(0)..secs(5))),
    });
    let callers = callers.collect();
    let mut changes: Vec<_> = (0..chance.random_range(0..20))
        .map(|_| {
            let at = chance.random_range(secs(0)..secs(10));
            (at, chance.random_range(0..servers.len()), conduct(chance, at))
        })
        .collect();
    // What hangs for ever would end nothing.
    changes.extend((0..servers.len()).map(|server| (secs(12), server, Conduct::good())));
    let pushes = (0..chance.random_range(0..6)).map(|_| {
        let all = servers.len();
        let some: Vec<usize> = (0..all).filter(|_| chance.random_bool(0.7)).collect();
        (chance.random_range(secs(0)..secs(10)), if some.is_empty() { (0..all).collect() } else { some })
    });
    let pushes = pushes.collect();
    let per_try = chance.random_bool(0.5).then(|| chance.random_range(Duration::from_millis(50)..secs(2)));
    let retry = policy(chance);
    let kinds = [Simple::PeakEwma, Simple::LeastRequest, Simple::RoundRobin, Simple::Random];
    let balancer = simple(kinds[chance.random_range(0..kinds.len())]);
    let placed = chance.random();
    let standing = |_: &Conduct| Standing {
        priority: chance.random_range(0..3),
        weight: [1, 1, 1, 2, 1_000][chance.random_range(0..5)],
    };
    let standings = if placed { servers.iter().map(standing).collect() } else { Vec::new() };
    let (ejects, lasts) = (true, secs(10));
    Script { servers, standings, callers, changes, pushes, per_try, retry, ejects, balancer, lasts }
}
