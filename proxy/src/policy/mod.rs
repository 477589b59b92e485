//! PURE: which rule takes a request, and which cluster it goes to. What the control plane said comes in, a rule and a name
//! come out.

use http::request;
use sheetbend_control_plane_client::model::{Backend, ClusterName, Destination, Match, PathMatch, Rule};

/// What was decided for a request.
#[derive(Clone, Copy, Debug)]
pub struct Chosen<'a> {
    /// The first rule that matches, if one does.
    pub rule: Option<&'a Rule>,
    /// Its choice among its backends, or the destination's default.
    pub cluster: &'a ClusterName,
}

/// Decides for a request. `chance` is drawn evenly from all u64.
pub fn choose<'a>(destination: &'a Destination, head: &request::Parts, chance: u64) -> Chosen<'a> {
    let rule = destination.rules.iter().find(|rule| matches(rule, head));
    let cluster = rule.and_then(|rule| weighted(&rule.backends, chance)).unwrap_or(&destination.default_cluster);
    Chosen { rule, cluster }
}

fn matches(rule: &Rule, head: &request::Parts) -> bool {
    rule.matches.is_empty() || rule.matches.iter().any(|condition| holds(condition, head))
}

fn holds(condition: &Match, head: &request::Parts) -> bool {
    let path = head.uri.path();
    let path_holds = match &condition.path {
        None => true,
        Some(PathMatch::Exact(exact)) => path == &**exact,
        Some(PathMatch::Regex(pattern)) => pattern.is_match(path.as_bytes()),
        Some(PathMatch::Prefix(prefix)) => {
            let prefix = prefix.trim_end_matches('/');
            path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        }
    };
    path_holds
        && condition.method.as_ref().is_none_or(|method| head.method.as_str() == &**method)
        && condition
            .headers
            .iter()
            .all(|(name, value)| head.headers.get(&**name).is_some_and(|found| found.as_bytes() == value.as_bytes()))
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

    fn head(path: &str) -> request::Parts {
        http::Request::get(path).header("x-a", "1").body(()).unwrap().into_parts().0
    }

    #[test]
    fn a_prefix_is_whole_path_elements() {
        let prefix = Match { path: Some(PathMatch::Prefix("/a".into())), ..Match::default() };
        assert!(holds(&prefix, &head("/a")) && holds(&prefix, &head("/a/b")));
        assert!(!holds(&prefix, &head("/ab")));
        let root = Match { path: Some(PathMatch::Prefix("/".into())), ..Match::default() };
        assert!(holds(&root, &head("/anything")));
    }

    #[test]
    fn all_conditions_must_hold() {
        let header = Match { headers: vec![("x-a".into(), "1".into())], ..Match::default() };
        assert!(holds(&header, &head("/")));
        let post = Match { method: Some("POST".into()), ..header };
        assert!(!holds(&post, &head("/")));
    }

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
