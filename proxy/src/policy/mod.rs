//! PURE: which rule takes a request, and which cluster it goes to. What the control plane said comes in, a rule and a name
//! come out.

pub mod authz;
mod index;

use http::request;
use sheetbend_control_plane_client::model::{Backend, ClusterName, Destination, Rule};

pub use index::Index;

/// What was decided for a request.
#[derive(Clone, Copy, Debug)]
pub struct Chosen<'a> {
    /// The first rule that matches, if one does.
    pub rule: Option<&'a Rule>,
    /// Its choice among its backends, or the destination's default.
    pub cluster: &'a ClusterName,
}

/// Decides for a request. `index` is of the destination's rules, `chance` is drawn evenly from all u64.
pub fn choose<'a>(destination: &'a Destination, index: &Index, head: &request::Parts, chance: u64) -> Chosen<'a> {
    let rule = index.find(head).and_then(|at| destination.rules.get(at));
    let cluster = rule.and_then(|rule| weighted(&rule.backends, chance)).unwrap_or(&destination.default_cluster);
    Chosen { rule, cluster }
}

fn weighted(backends: &[Backend], chance: u64) -> Option<&ClusterName> {
    let sum: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    let mut at = chance.checked_rem(sum)?;
    for backend in backends {
        let weight = u64::from(backend.weight);
        if at < weight {
            return Some(&backend.cluster);
        }
        at -= weight;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_of_nothing_gets_nothing() {
        let of = |cluster: &str, weight| Backend { cluster: cluster.into(), weight };
        let backends = [of("a", 0), of("b", 3)];
        for chance in 0..10 {
            assert_eq!(weighted(&backends, chance).map(|c| &**c), Some("b"));
        }
        assert_eq!(weighted(&[], 1), None);
    }
}
