//! Many runs of one promise.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rand::SeedableRng;
use rand::rngs::StdRng;

/// Holds a promise against so many seeds, or against those that the environment asks for, on as many threads as there are
/// cores. The smallest that breaks it is named, so that it can be played again.
pub(crate) fn for_each_seed(usual: u64, promise: impl Fn(u64, &mut StdRng) -> Result<(), String> + Sync) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number of seeds"));
    let seeds = match (number("SHEETBEND_SEED"), number("SHEETBEND_SEEDS")) {
        (Some(seed), _) => seed..seed + 1,
        (None, Some(seeds)) => 0..seeds,
        (None, None) => 0..usual,
    };
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    if let Some((seed, what)) = first_broken(seeds, threads, promise) {
        panic!("{what}\nto play it again: SHEETBEND_SEED={seed}");
    }
}

/// The smallest seed that breaks a promise, and how. Seeds are begun in their order, and whatever was begun is ended: all
/// that are smaller have been played.
fn first_broken(
    seeds: Range<u64>,
    threads: usize,
    promise: impl Fn(u64, &mut StdRng) -> Result<(), String> + Sync,
) -> Option<(u64, String)> {
    let next = AtomicU64::new(seeds.start);
    let first = Mutex::new(None::<(u64, String)>);
    let play = || {
        while first.lock().unwrap().is_none() {
            let seed = next.fetch_add(1, Relaxed);
            if seed >= seeds.end {
                return;
            }
            let played = catch_unwind(AssertUnwindSafe(|| promise(seed, &mut StdRng::seed_from_u64(seed))));
            let Err(what) = played.unwrap_or_else(|_| Err("it panicked".to_string())) else { continue };
            let mut first = first.lock().unwrap();
            if first.as_ref().is_none_or(|(smallest, _)| seed < *smallest) {
                *first = Some((seed, what));
            }
        }
    };
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(play))));
    first.into_inner().unwrap()
}

#[test]
fn however_many_threads_play_the_smallest_seed_that_breaks_a_promise_is_named() {
    for threads in 1..9 {
        let promise = |seed, _: &mut StdRng| match seed {
            23 => {
                std::thread::yield_now();
                Err("late".to_string())
            }
            24.. => Err("soon".to_string()),
            _ => Ok(()),
        };
        assert_eq!(first_broken(0..1_000, threads, promise), Some((23, "late".to_string())));
        assert_eq!(first_broken(0..23, threads, promise), None);
    }
}
