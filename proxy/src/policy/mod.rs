//! PURE: which rule takes a request, and which cluster it goes to. What the control plane said comes in, a rule and a name
//! come out.

pub mod authz;
mod connection;
mod fault;
mod filter;
mod index;
pub mod paths;
pub mod tokens;

use http::uri::Authority;
use http::{HeaderMap, request};
use sheetbend_control_plane_client::model::{ClusterName, Destination, Rule};

pub use connection::{Unrouted, connect};
pub use fault::{Abort, Fault, Injected, inject};
pub use filter::{BackendEdits, Filtered, RuleFilters};
pub use index::{Found, Index};

/// A destination's rules, made ready for requests.
#[derive(Debug, Default)]
pub struct Rules {
    index: Index,
    ready: Vec<Ready>,
}

/// What a rule does, made ready. Nothing, for most rules.
#[derive(Debug)]
struct Ready {
    filters: Option<Box<RuleFilters>>,
    backends: Vec<Option<Box<BackendEdits>>>,
    faults: Vec<Fault>,
}

/// What was decided for a request.
#[derive(Clone, Copy, Debug)]
pub struct Chosen<'a> {
    /// The first rule that matches, if one does.
    pub rule: Option<&'a Rule>,
    /// Its choice among its backends, or the destination's default; none where its requests go nowhere.
    pub cluster: Option<&'a ClusterName>,
    /// What it does to the request and its answer.
    pub changes: Changes<'a>,
    /// What may go wrong on purpose.
    pub faults: &'a [Fault],
}

/// What a rule and the chosen backend do to a request and its answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changes<'a> {
    filters: Option<&'a RuleFilters>,
    backend: Option<&'a BackendEdits>,
    prefix: usize,
}

impl Changes<'_> {
    /// To the request, and to the authority that the next hop is told.
    pub fn apply(&self, head: &mut request::Parts, authority: &mut Authority) -> Filtered {
        let filtered = self.filters.map(|filters| filters.apply(head, authority, self.prefix));
        if let Some(backend) = self.backend {
            backend.request.apply(&mut head.headers);
        }
        filtered.unwrap_or(Filtered::Continue)
    }

    /// To the answer.
    pub fn answer(&self, headers: &mut HeaderMap) {
        if let Some(filters) = self.filters {
            filters.answer(headers);
        }
        if let Some(backend) = self.backend {
            backend.response.apply(headers);
        }
    }
}

impl Rules {
    /// Of a destination.
    pub fn new(rules: &[Rule]) -> Self {
        let ready = rules.iter().map(|rule| Ready {
            filters: RuleFilters::new(&rule.policy.filters).map(Box::new),
            backends: rule.backends.iter().map(|one| BackendEdits::new(&one.headers).map(Box::new)).collect(),
            faults: rule.policy.faults.iter().filter_map(Fault::new).collect(),
        });
        Self { index: Index::new(rules), ready: ready.collect() }
    }

    /// Decides for a request to the destination that these rules are of. `chance` is drawn evenly from all u64.
    pub fn choose<'a>(&'a self, destination: &'a Destination, head: &request::Parts, chance: u64) -> Chosen<'a> {
        let found = self.index.find(head);
        let found = found.and_then(|at| Some((at, destination.rules.get(at.rule)?, self.ready.get(at.rule)?)));
        let Some((at, rule, ready)) = found else {
            let cluster = Some(&destination.default_cluster);
            return Chosen { rule: None, cluster, changes: Changes::default(), faults: &[] };
        };
        let backend = weighted(rule.backends.iter().map(|backend| backend.weight), chance);
        let changes = Changes {
            filters: ready.filters.as_deref(),
            backend: backend.and_then(|at| ready.backends.get(at)?.as_deref()),
            prefix: at.prefix,
        };
        let cluster = backend.and_then(|at| rule.backends.get(at)).map(|backend| &backend.cluster);
        Chosen { rule: Some(rule), cluster, changes, faults: &ready.faults }
    }
}

fn weighted(weights: impl Iterator<Item = u32> + Clone, chance: u64) -> Option<usize> {
    let sum: u64 = weights.clone().map(u64::from).sum();
    let mut at = chance.checked_rem(sum)?;
    for (number, weight) in weights.map(u64::from).enumerate() {
        if at < weight {
            return Some(number);
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
        for chance in 0..10 {
            assert_eq!(weighted([0, 3].into_iter(), chance), Some(1));
        }
        assert_eq!(weighted([].into_iter(), 1), None);
    }
}
