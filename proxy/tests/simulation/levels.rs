//! What holds where endpoints are not alike: priorities, weights, and those that come back.

use std::time::Duration;

use rand::RngExt;

use super::script::{Caller, Conduct, Script, Standing};
use super::seeds::for_each_seed;
use super::world::play;
use super::{of, secs};

/// So many endpoints of the first priority, and so many of the second.
fn two_levels(first: usize, second: usize, rate: f64, lasts: Duration) -> Script {
    let mut script = of(vec![Conduct::good(); first + second], vec![Caller::at(rate)], lasts);
    script.standings = (0..first + second).map(|at| Standing { priority: u32::from(at >= first), weight: 1 }).collect();
    script
}

#[test]
fn a_common_cause_leaves_half_of_all_priorities_in_use_and_ejects_nobody_more_once_it_is_known() {
    for_each_seed(20, |seed, chance| {
        let (first, second) = (chance.random_range(1..12), chance.random_range(1..5));
        let mut script = two_levels(first, second, chance.random_range(50.0..2_000.0), secs(20));
        let bad = [Conduct::failing(1.0), Conduct::Resets, Conduct::Refuses][chance.random_range(0..3)].clone();
        script.changes.extend((0..first + second).map(|at| (secs(5), at, bad.clone())));
        let record = play(&script, seed);
        record.check()?;
        // As many as it takes for the second to be asked.
        let most = first - (first * 5).div_ceil(7) + 1;
        let ejected = (0..first).filter(|at| record.ejections_of(*at, secs(0)..secs(20)) > 0).count();
        let others: usize = (first..first + second).map(|at| record.ejections_of(at, secs(0)..secs(20))).sum();
        (ejected <= most && others == 0)
            .then_some(())
            .ok_or(format!("{ejected} of {first} ejected, and {others} of the other {second}"))
    });
}

#[test]
fn where_the_first_priority_fails_the_second_takes_over_soon_however_small_it_is() {
    for_each_seed(20, |seed, chance| {
        let (first, second) = (chance.random_range(1..8), chance.random_range(1..4));
        let mut script = two_levels(first, second, chance.random_range(100.0..500.0), secs(30));
        let bad = [Conduct::failing(1.0), Conduct::Resets, Conduct::Refuses][chance.random_range(0..3)].clone();
        script.changes.extend((0..first).map(|at| (secs(5), at, bad.clone())));
        let record = play(&script, seed);
        let success = record.success(secs(10)..secs(30));
        (success >= 0.98).then_some(()).ok_or(format!("{success:.3} with {first} {bad:?} and {second} good"))?;
        record.check()
    });
}

#[test]
fn a_priority_that_comes_back_with_one_endpoint_grows_into_its_traffic() {
    for_each_seed(20, |seed, chance| {
        let rate = chance.random_range(300.0..1_000.0);
        let mut script = two_levels(1, chance.random_range(1..4), rate, secs(20));
        let bad = [Conduct::failing(1.0), Conduct::Resets, Conduct::Refuses][chance.random_range(0..3)].clone();
        let recovers = chance.random_range(secs(2)..secs(6));
        script.changes = vec![(secs(1), 0, bad), (recovers, 0, Conduct::good())];
        let record = play(&script, seed);
        let back = record.first_asked(0, recovers).ok_or("it is never tried")?;
        // Its share grows for half a second at least.
        let usual = rate * 0.1;
        let first = record.loads(back..back + Duration::from_millis(100))[0] as f64;
        (first <= usual * 0.3 + 5.0 * (usual * 0.1).sqrt())
            .then_some(())
            .ok_or(format!("{first} in the first tenth of a second, {usual:.0} is usual"))?;
        let late = record.loads(back + secs(8)..back + secs(10));
        (late[0] == late.iter().sum::<usize>()).then_some(()).ok_or(format!("{late:?} in the end"))?;
        record.check()
    });
}

#[test]
fn one_that_hangs_is_tried_by_one_request_at_a_time_however_heavy_it_is() {
    for_each_seed(20, |seed, chance| {
        let mut script = of(vec![Conduct::good(); 3], vec![Caller::at(chance.random_range(100.0..300.0))], secs(40));
        script.standings = [1_000, 1, 1].map(|weight| Standing { priority: 0, weight }).to_vec();
        script.per_try = Some(Duration::from_millis(250));
        script.changes = vec![(secs(2), 0, Conduct::Hangs)];
        let record = play(&script, seed);
        // Ejections of 1, 2, 4, 8 and 16 s, each with one probe at its end.
        let asked = record.loads(secs(4)..secs(40))[0];
        (asked <= 8).then_some(()).ok_or(format!("{asked} requests to it"))?;
        record.check()
    });
}

#[test]
fn one_that_comes_back_slow_is_not_stampeded_and_has_its_share_when_it_is_fast_again() {
    for_each_seed(20, |seed, chance| {
        let rate = chance.random_range(200.0..1_000.0);
        let mut script = of(vec![Conduct::good(); 5], vec![Caller::at(rate)], secs(60));
        script.servers[0] = [Conduct::Resets, Conduct::Refuses, Conduct::Silent { since: Duration::ZERO }]
            [chance.random_range(0..3)]
        .clone();
        script.per_try = Some(Duration::from_millis(250));
        let (recovers, takes) = (secs(3), chance.random_range(secs(1)..secs(5)));
        for (slower, part) in [(10, 0), (7, 1), (4, 2), (2, 3), (1, 4)] {
            script.changes.push((recovers + takes * part / 4, 0, Conduct::slower(slower)));
        }
        let record = play(&script, seed);
        let usual = rate / 5.0;
        let seconds = (0..100).map(|at| recovers + Duration::from_millis(100) * at);
        let most = seconds.map(|at| record.loads(at..at + secs(1))[0]).max().unwrap_or(0) as f64;
        (most <= usual * 2.0 + 5.0 * usual.sqrt())
            .then_some(())
            .ok_or(format!("{most} in a second, {usual:.0} is usual"))?;
        let late = record.loads(secs(45)..secs(60));
        // Alike is not the same: the peak of one that was slow once keeps some away from it for seconds.
        let share = late[0] as f64 * 5.0 / late.iter().sum::<usize>() as f64;
        (share >= 0.5).then_some(()).ok_or(format!("{share:.2} of its share in the end"))?;
        let success = record.success(recovers..secs(60));
        (success >= 0.999).then_some(()).ok_or(format!("{success:.5} meanwhile"))?;
        record.check()
    });
}
