//! Many runs of one promise.

use rand::SeedableRng;
use rand::rngs::StdRng;

/// Holds a promise against so many seeds, or against those that the environment asks for. The first that breaks it is
/// named, so that it can be played again.
pub(crate) fn for_each_seed(usual: u64, promise: impl Fn(u64, &mut StdRng) -> Result<(), String> + Sync) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number of seeds"));
    let seeds = match (number("SHEETBEND_SEED"), number("SHEETBEND_SEEDS")) {
        (Some(seed), _) => seed..seed + 1,
        (None, Some(seeds)) => 0..seeds,
        (None, None) => 0..usual,
    };
    for seed in seeds {
        if let Err(what) = promise(seed, &mut StdRng::seed_from_u64(seed)) {
            panic!("{what}\nto play it again: SHEETBEND_SEED={seed}");
        }
    }
}
