//! PURE: the same endpoint for the same caller. Endpoints have places on a ring of hashes (Karger et al., "Consistent
//! Hashing and Random Trees"; the hash is Envoy's, XXH64), and a caller gets the one whose place comes next after its own.
//! One that is gone hands its callers to the next ones on the ring, and everybody else keeps theirs.

use std::fmt::Write;
use std::net::SocketAddr;

use twox_hash::XxHash64;

/// Where nobody says otherwise, as in Istio.
pub const MINIMUM_SIZE: u32 = 1024;
/// Nobody may want more.
pub const MAXIMUM_SIZE: u32 = sheetbend_control_plane_client::model::MAX_RING;
/// As many times its minimum a ring is at most, but for one place an endpoint; and never more than [`MAXIMUM_SIZE`] where half
/// as many places are enough.
pub const CROWD: f64 = 16.0;

/// A caller's place, by whatever it is known by.
pub fn hash(key: &[u8]) -> u64 {
    XxHash64::oneshot(0, key)
}

/// Places in order, each with the number of its endpoint.
#[derive(Debug, Default)]
pub struct Ring {
    places: Box<[(u64, u32)]>,
}

impl Ring {
    /// A ring of at least so many places, shared by weight; each endpoint has one at least.
    ///
    /// How many places an endpoint has follows from its own weight, so that one that comes or goes moves nobody between the
    /// others. Only as the sum of weights passes a power of two above [`CROWD`], all have half as many.
    pub fn new(endpoints: impl Iterator<Item = (u32, SocketAddr, u32)> + Clone, minimum: u32) -> Self {
        let minimum = f64::from(minimum.clamp(1, MAXIMUM_SIZE));
        let all: f64 = endpoints.clone().map(|(_, _, weight)| f64::from(weight)).sum();
        let each = places(all, minimum);
        let mut places = Vec::new();
        let mut key = String::new();
        for (number, address, weight) in endpoints {
            for place in 0..(f64::from(weight) * each).ceil().max(1.0) as u32 {
                key.clear();
                // Writing to a String does not fail.
                let _ = write!(key, "{address}_{place}");
                places.push((hash(key.as_bytes()), number));
            }
        }
        places.sort_unstable();
        Self { places: places.into() }
    }

    /// The endpoint of a place: the first one from there on that is `admitted`, or the first at all.
    pub fn pick(&self, place: u64, admitted: impl Fn(usize) -> bool) -> Option<usize> {
        let from = self.places.partition_point(|(at, _)| *at < place);
        let (before, after) = self.places.split_at(from);
        let walk = after.iter().chain(before).map(|(_, number)| *number as usize);
        walk.clone().find(|number| admitted(*number)).or_else(|| walk.clone().next())
    }
}

/// How many places a weight of one has, of `all` weights.
fn places(all: f64, minimum: f64) -> f64 {
    let most = (minimum * CROWD).min(f64::from(MAXIMUM_SIZE));
    let mut each = minimum;
    while all * each > most && all * each / 2.0 >= minimum {
        each /= 2.0;
    }
    each
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ring(n: u32) -> Ring {
        let endpoint = |number: u32| (number, ([127, 0, (number >> 8) as u8, number as u8], 80).into(), 1);
        Ring::new((0..n).map(endpoint), MINIMUM_SIZE)
    }

    fn owner(ring: &Ring, caller: u32) -> usize {
        ring.pick(hash(&caller.to_be_bytes()), |_| true).unwrap()
    }

    #[test]
    fn every_endpoint_has_a_share_of_callers_near_to_its_weight() {
        let endpoint = |number: u32| (number, ([127, 0, 0, number as u8], 80).into(), number + 1);
        let ring = Ring::new((0..4).map(endpoint), 4096);
        let mut shares = [0; 4];
        (0..100_000).for_each(|caller| shares[owner(&ring, caller)] += 1);
        for (number, share) in shares.iter().enumerate() {
            let fair = 10_000 * (number + 1);
            assert!((fair * 8 / 10..fair * 12 / 10).contains(share), "{shares:?}");
        }
    }

    proptest! {
        #[test]
        fn who_is_not_admitted_hands_on_its_own_callers_alone(
            n in 2u32..40, out in 0usize..40, callers in proptest::collection::vec(any::<u32>(), 100)
        ) {
            let ring = ring(n);
            let out = out % n as usize;
            for caller in callers {
                let (before, now) = (owner(&ring, caller), ring.pick(hash(&caller.to_be_bytes()), |at| at != out));
                prop_assert_ne!(now, Some(out));
                prop_assert!(before == out || now == Some(before));
            }
        }

        #[test]
        fn a_newcomer_takes_callers_and_moves_nobody_between_the_others(
            n in 1u32..16, callers in proptest::collection::vec(any::<u32>(), 100)
        ) {
            let (before, after) = (ring(n), ring(n + 1));
            for caller in callers {
                let (was, is) = (owner(&before, caller), owner(&after, caller));
                prop_assert!(is == was || is == n as usize);
            }
        }
    }

    #[test]
    fn a_ring_has_its_minimum_and_not_many_times_more() {
        for n in [1, 2, 16, 17, 100, 1_000, 10_000] {
            let places = ring(n).places.len();
            assert!((1_024..=16 * 1_024 + n as usize).contains(&places), "{places} places of {n}");
        }
    }

    #[test]
    fn a_large_ring_is_not_made_many_times_as_large_by_its_endpoints() {
        let largest = f64::from(MAXIMUM_SIZE);
        for minimum in [largest, largest / 2.0, largest / 16.0, 1_000_000.0] {
            for all in [1.0, 2.0, 3.0, 16.0, 17.0, 1_000.0, 1e9] {
                let size = all * places(all, minimum);
                assert!(
                    size >= minimum && size < largest.max(minimum * 2.0) * 1.001,
                    "{size} of {all}, {minimum} at least"
                );
            }
        }
    }

    #[test]
    fn where_nobody_is_admitted_the_caller_keeps_its_own() {
        let ring = ring(5);
        assert_eq!(ring.pick(7, |_| false), ring.pick(7, |_| true));
        assert_eq!(Ring::default().pick(7, |_| true), None);
    }
}
