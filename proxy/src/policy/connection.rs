//! PURE: where a connection goes as a whole, and why it may go nowhere.

use std::fmt;
use std::sync::Arc;

use sheetbend_control_plane_client::model::{ClusterName, ConnectionRule};

use super::weighted;

/// Why a connection goes nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unrouted {
    /// No route takes connections to this server; none: the client names none, or does not speak TLS.
    Server(Option<Box<str>>),
    /// The rule that takes it has no backend with any weight.
    NoBackend {
        /// Which.
        rule: Arc<str>,
        /// Where it is written.
        place: Arc<str>,
    },
}

impl fmt::Display for Unrouted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server(Some(name)) => {
                write!(f, "no TLSRoute takes connections to the server `{}`", name.escape_debug())
            }
            Self::Server(None) => f.write_str("TLSRoutes decide by the server's name, and the client names none"),
            Self::NoBackend { rule, place } if place.is_empty() => write!(f, "the rule {rule} has no backend"),
            Self::NoBackend { rule, place } => write!(f, "the rule {rule} ({place}) has no backend"),
        }
    }
}

/// The cluster of a connection whose client names this server. `chance` is drawn evenly from all u64.
pub fn connect<'a>(
    rules: &'a [ConnectionRule],
    server_name: Option<&str>,
    chance: u64,
) -> Result<&'a ClusterName, Unrouted> {
    let rule = rules.iter().find(|rule| rule.takes(server_name));
    let rule = rule.ok_or_else(|| Unrouted::Server(server_name.map(Box::from)))?;
    let chosen = weighted(rule.backends.iter().map(|backend| backend.weight), chance);
    match chosen.and_then(|at| rule.backends.get(at)) {
        Some(backend) => Ok(&backend.cluster),
        None => Err(Unrouted::NoBackend { rule: rule.name.clone(), place: rule.place.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use sheetbend_control_plane_client::model::ConnectionBackend;

    use super::*;

    fn rule(hostname: Option<&str>, backends: &[(&str, u32)]) -> ConnectionRule {
        let backends =
            backends.iter().map(|(name, weight)| ConnectionBackend { cluster: (*name).into(), weight: *weight });
        let (name, place) = ("default/r#0".into(), "db.yaml:7".into());
        ConnectionRule { name, place, hostname: hostname.map(Arc::from), backends: backends.collect() }
    }

    #[test]
    fn the_first_rule_that_takes_it_decides() {
        let rules = [rule(Some("a.db.example"), &[("a", 1)]), rule(Some("*.db.example"), &[("rest", 1)])];
        let to = |name| connect(&rules, name, 0).map(|cluster| &**cluster);
        assert_eq!(to(Some("a.db.example")), Ok("a"));
        assert_eq!(to(Some("b.db.example")), Ok("rest"));
        assert_eq!(to(Some("db.example")), Err(Unrouted::Server(Some("db.example".into()))));
        assert_eq!(to(None), Err(Unrouted::Server(None)));
    }

    #[test]
    fn connections_are_shared_by_weight_and_nobody_goes_where_there_is_none() {
        let split = [rule(None, &[("a", 1), ("off", 0), ("b", 3)])];
        let to: Vec<&str> = (0..8).map(|chance| &**connect(&split, None, chance).unwrap()).collect();
        assert_eq!(to, ["a", "b", "b", "b", "a", "b", "b", "b"]);
        for closed in [&[][..], &[("a", 0)]] {
            let refused = connect(&[rule(None, closed)], None, 7).unwrap_err();
            assert_eq!(refused.to_string(), "the rule default/r#0 (db.yaml:7) has no backend");
        }
    }
}
