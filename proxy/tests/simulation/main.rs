//! The whole judgement of the proxies, played in virtual time from thousands of seeds.
//!
//! A seed that fails is printed. `SHEETBEND_SEED=N` plays that one alone, `SHEETBEND_SEEDS=N` as many as one likes.

mod proxy;
mod record;
mod script;
mod seeds;
mod server;
mod world;

use std::time::Duration;

use rand::RngExt;
use script::{Caller, Conduct, Script};
use seeds::for_each_seed;
use world::play;

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn of(servers: Vec<Conduct>, callers: Vec<Caller>, lasts: Duration) -> Script {
    Script { servers, callers, changes: Vec::new(), lasts }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for_each_seed(20, |seed, chance| {
        let script = anything(chance);
        assert_eq!(play(&script, seed), play(&script, seed));
        Ok(())
    });
}

#[test]
fn whatever_happens_nothing_is_paid_twice_no_budget_is_exceeded_and_nothing_stays_counted() {
    for_each_seed(2_000, |seed, chance| play(&anything(chance), seed).check());
}

#[test]
fn in_a_total_outage_retries_add_a_fifth_and_ten_a_second_at_most() {
    for_each_seed(200, |seed, chance| {
        let rate = chance.random_range(5.0..500.0);
        let bad = [Conduct::failing(1.0), Conduct::Refuses, Conduct::Resets][chance.random_range(0..3)].clone();
        let servers = chance.random_range(1..8);
        let record = play(&of(vec![bad; servers], vec![Caller::at(rate)], secs(20)), seed);
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
    for_each_seed(100, |seed, chance| {
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
    for_each_seed(50, |seed, chance| {
        let servers = chance.random_range(2..9);
        let record = play(&of(vec![Conduct::good(); servers], vec![Caller::at(1_000.0)], secs(11)), seed);
        let loads = record.loads(secs(1)..secs(11));
        let mean = loads.iter().sum::<usize>() / servers;
        // The peak of an endpoint that was slow once keeps some away from it for seconds: alike is not the same.
        let alike = loads.iter().all(|load| (mean / 2..mean * 2).contains(load));
        alike.then_some(()).ok_or(format!("{loads:?}"))
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
    Script { servers, callers, changes, lasts: secs(10) }
}
