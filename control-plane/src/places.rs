//! A number of places of which one source may hold some. When they run out, whoever has held one for the longest goes.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::sleep;

/// The places.
pub(crate) struct Places {
    most: usize,
    /// Of one address; of one /64 for IPv6, which is what one host is given. Loopback is the whole machine, and may
    /// hold them all.
    of_one: usize,
    /// Nobody goes sooner: under load the honest take a while too, and would chase each other out.
    grace: Duration,
    held: Mutex<VecDeque<Held>>,
    freed: Notify,
}

struct Held {
    source: IpAddr,
    since: Instant,
    /// Also tells one from the other.
    lost: Arc<Notify>,
}

/// A place, until it is dropped or lost.
pub(crate) struct Place {
    places: Arc<Places>,
    lost: Arc<Notify>,
}

impl Places {
    /// `most` of them; one source may hold an eighth.
    pub(crate) fn new(most: usize, grace: Duration) -> Arc<Self> {
        let (held, freed) = (Mutex::default(), Notify::new());
        Arc::new(Self { most, of_one: most.div_ceil(8), grace, held, freed })
    }

    /// Returns once there is a place that is free, or whose holder has had its grace.
    pub(crate) async fn room(&self) {
        loop {
            let freed = self.freed.notified();
            let wait = {
                let held = self.held();
                let oldest = held.front().filter(|_| held.len() >= self.most);
                oldest.map_or(Duration::ZERO, |oldest| self.grace.saturating_sub(oldest.since.elapsed()))
            };
            if wait.is_zero() {
                return;
            }
            // In no order: either is a reason to look again.
            tokio::select! {
                () = freed => {}
                () = sleep(wait) => {}
            }
        }
    }

    /// A place for `source`, taken from whoever has held one for the longest if it must be: from its own first, when it
    /// holds as many as one may. `None` if that one still has its grace.
    pub(crate) fn take(self: &Arc<Self>, source: IpAddr) -> Option<Place> {
        let source = network(source);
        let mut held = self.held();
        let own = held.iter().filter(|held| held.source == source).count();
        let goes = match () {
            () if own >= self.of_one && !source.is_loopback() => held.iter().position(|held| held.source == source),
            () if held.len() >= self.most => Some(0),
            () => None,
        };
        if let Some(goes) = goes {
            held.get(goes).filter(|oldest| oldest.since.elapsed() >= self.grace)?;
            if let Some(gone) = held.remove(goes) {
                gone.lost.notify_one();
            }
        }
        let lost = Arc::new(Notify::new());
        held.push_back(Held { source, since: Instant::now(), lost: lost.clone() });
        Some(Place { places: self.clone(), lost })
    }

    fn held(&self) -> MutexGuard<'_, VecDeque<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Returns once another has it.
    pub(crate) async fn lost(&self) {
        self.lost.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.held().retain(|held| !Arc::ptr_eq(&held.lost, &self.lost));
        self.places.freed.notify_one();
    }
}

fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) if !address.is_loopback() => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)))
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn source(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn is_lost(place: &Place) -> bool {
        place.lost().now_or_never().is_some()
    }

    #[test]
    fn one_source_that_takes_too_many_loses_its_own_oldest_and_no_other_does() {
        let places = Places::new(16, Duration::ZERO);
        let other = places.take(source(1)).unwrap();
        let greedy: Vec<_> = (0..20).map(|_| places.take(source(2)).unwrap()).collect();
        assert!(!is_lost(&other));
        assert_eq!(greedy.iter().filter(|place| !is_lost(place)).count(), 2);
        let of_one_host = (0..20u8).map(|last| IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, last.into()]));
        let of_one_host: Vec<_> = of_one_host.map(|source| places.take(source).unwrap()).collect();
        assert_eq!(of_one_host.iter().filter(|place| !is_lost(place)).count(), 2);
    }

    #[test]
    fn when_all_are_held_the_oldest_goes() {
        let places = Places::new(8, Duration::ZERO);
        let first = places.take(source(0)).unwrap();
        let others: Vec<_> = (1..=8).map(|last| places.take(source(last)).unwrap()).collect();
        assert!(is_lost(&first));
        assert!(!others.iter().any(is_lost));
    }

    #[test]
    fn nobody_goes_within_its_grace_and_a_place_given_back_is_free() {
        let places = Places::new(8, DAY);
        let place = places.take(source(1)).unwrap();
        assert!(places.take(source(1)).is_none());
        drop(place);
        let _again = places.take(source(1)).unwrap();
    }

    #[tokio::test]
    async fn this_machine_may_hold_all_and_then_waits() {
        let places = Places::new(8, DAY);
        let mut held: Vec<_> = (0..8).map(|_| places.take([127, 0, 0, 1].into()).unwrap()).collect();
        let mut room = Box::pin(places.room());
        assert!(room.as_mut().now_or_never().is_none());
        held.pop();
        assert!(room.now_or_never().is_some(), "a place given back wakes whoever waits");
    }
}
