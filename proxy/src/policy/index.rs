//! PURE: a destination's conditions, made ready for being asked by every request.
//!
//! What the index says is what a search from the first condition to the last would say: the first that holds. It only knows
//! where that cannot be: exact paths and prefixes are looked up, so that a thousand of them cost a request as much as one.
//! Nothing here allocates for a request, but for a header that came more than once.

use std::collections::HashMap;
use std::sync::Arc;

use http::header::{HOST, HeaderName};
use http::{Method, request};
use sheetbend_control_plane_client::model::{Match, PathMatch, Pattern, Rule, TextMatch};

/// Conditions in the order in which they are asked.
#[derive(Debug, Default)]
pub struct Index {
    conditions: Vec<Condition>,
    /// Conditions by the path that they want, each list from the first to the last.
    exact: HashMap<Arc<str>, Vec<usize>>,
    /// By the prefix, without a slash at its end.
    prefixes: HashMap<Arc<str>, Vec<usize>>,
    /// How long prefixes are, the longest first: those parts alone of a path are looked up.
    lengths: Vec<usize>,
    /// Conditions that look at any path.
    anywhere: Vec<usize>,
}

/// What is left to ask where the path is known to hold.
#[derive(Debug)]
struct Condition {
    /// Whose it is.
    rule: usize,
    /// How long the prefix is that it wants.
    prefix: usize,
    path: Option<Pattern>,
    method: Option<Method>,
    headers: Vec<(HeaderName, TextMatch)>,
    query: Vec<(Arc<str>, TextMatch)>,
}

/// The rule that takes a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Which, of the rules that the index was made of.
    pub rule: usize,
    /// How much of the path it matched, where that was a prefix: without a slash at the end.
    pub prefix: usize,
}

impl Index {
    /// Rules in the order in which they are asked.
    pub fn new(rules: &[Rule]) -> Self {
        let mut index = Self::default();
        let everything = [Match::default()];
        for (number, rule) in rules.iter().enumerate() {
            let matches = if rule.matches.is_empty() { &everything[..] } else { &rule.matches[..] };
            matches.iter().for_each(|one| index.add(number, one));
        }
        index.lengths = index.prefixes.keys().map(|prefix| prefix.len()).collect();
        index.lengths.sort_unstable_by(|a, b| b.cmp(a));
        index.lengths.dedup();
        index
    }

    fn add(&mut self, rule: usize, one: &Match) {
        // What is no method or name is in no request: that condition never holds.
        let Ok(method) = one.method.as_ref().map(|m| Method::from_bytes(m.as_bytes())).transpose() else { return };
        let names = one.headers.iter().map(|(name, value)| Some((name.parse().ok()?, value.clone())));
        let Some(headers) = names.collect::<Option<_>>() else { return };
        let at = self.conditions.len();
        let prefix = match &one.path {
            Some(PathMatch::Prefix(path)) => path.trim_end_matches('/').len(),
            _ => 0,
        };
        let (path, list) = match &one.path {
            None => (None, &mut self.anywhere),
            Some(PathMatch::Regex(pattern)) => (Some(pattern.clone()), &mut self.anywhere),
            Some(PathMatch::Exact(path)) => (None, self.exact.entry(path.clone()).or_default()),
            Some(PathMatch::Prefix(path)) => {
                (None, self.prefixes.entry(path.trim_end_matches('/').into()).or_default())
            }
        };
        list.push(at);
        self.conditions.push(Condition { rule, prefix, path, method, headers, query: one.query.clone() });
    }

    /// Which rule takes a request.
    pub fn find(&self, head: &request::Parts) -> Option<Found> {
        let path = head.uri.path();
        let mut first = None;
        let mut ask = |list: &[usize]| {
            let earlier = list.iter().take_while(|at| first.is_none_or(|first| **at < first));
            first = earlier.copied().find(|at| self.conditions[*at].holds(head)).or(first);
        };
        self.exact.get(path).into_iter().for_each(|list| ask(list));
        for length in &self.lengths {
            // Whole elements: what follows is a slash, or nothing.
            let whole = path.len() == *length || path.as_bytes().get(*length) == Some(&b'/');
            if let Some(prefix) = path.get(..*length).filter(|_| whole) {
                self.prefixes.get(prefix).into_iter().for_each(|list| ask(list));
            }
        }
        ask(&self.anywhere);
        first.map(|at| Found { rule: self.conditions[at].rule, prefix: self.conditions[at].prefix })
    }
}

impl Condition {
    fn holds(&self, head: &request::Parts) -> bool {
        self.method.as_ref().is_none_or(|method| head.method == *method)
            && self.headers.iter().all(|(name, value)| header(head, name, value))
            && self.query.iter().all(|(name, value)| parameter(head, name).is_some_and(|v| value.holds(v.as_bytes())))
            && self.path.as_ref().is_none_or(|pattern| pattern.is_match(head.uri.path().as_bytes()))
    }
}

/// Whether a header has the value that is wanted.
pub(super) fn header(head: &request::Parts, name: &HeaderName, wanted: &TextMatch) -> bool {
    // HTTP/2 says it in the URI, and so does HTTP/1.1 to a proxy (RFC 9112 §3.2.2).
    if let Some(authority) = head.uri.authority().filter(|_| *name == HOST) {
        return wanted.holds(authority.as_str().as_bytes());
    }
    let mut values = head.headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => false,
        (Some(only), None) => wanted.holds(only.as_bytes()),
        // Lines of one name are one value (RFC 9110 §5.3). Allocates: seldom.
        (Some(_), Some(_)) => {
            let lines: Vec<&[u8]> = head.headers.get_all(name).iter().map(|value| value.as_bytes()).collect();
            wanted.holds(&lines.join(&b','))
        }
    }
}

/// The first of this name, as it stands there.
fn parameter<'a>(head: &'a request::Parts, name: &str) -> Option<&'a str> {
    let pairs = head.uri.query()?.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.into_iter().find(|(found, _)| *found == name).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use http::Request;
    use proptest::prelude::*;
    use sheetbend_control_plane_client::model::Backend;

    use super::*;

    /// What the index is measured against: from the first condition to the last, path by path.
    fn search(rules: &[Rule], head: &request::Parts) -> Option<usize> {
        rules.iter().position(|rule| rule.matches.is_empty() || rule.matches.iter().any(|one| holds(one, head)))
    }

    fn holds(one: &Match, head: &request::Parts) -> bool {
        let path = head.uri.path();
        let path_holds = match &one.path {
            None => true,
            Some(PathMatch::Exact(exact)) => path == &**exact,
            Some(PathMatch::Regex(pattern)) => pattern.is_match(path.as_bytes()),
            Some(PathMatch::Prefix(prefix)) => {
                let wanted: Vec<&str> = prefix.trim_end_matches('/').split('/').collect();
                path.split('/').collect::<Vec<_>>().starts_with(&wanted)
            }
        };
        let header_holds = |name: &str, wanted: &TextMatch| {
            let found = head.headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect::<Vec<_>>();
            !found.is_empty() && wanted.holds(found.join(",").as_bytes())
        };
        path_holds
            && one.method.as_ref().is_none_or(|method| head.method.as_str() == &**method)
            && one.headers.iter().all(|(name, wanted)| header_holds(name, wanted))
            && one.query.iter().all(|(name, wanted)| parameter(head, name).is_some_and(|v| wanted.holds(v.as_bytes())))
    }

    fn rule(matches: Vec<Match>) -> Rule {
        let backends = vec![Backend { cluster: "web.default:80".into(), weight: 1, headers: Default::default() }];
        Rule { name: "default/web#0".into(), matches, backends, policy: Arc::default() }
    }

    fn path(path: PathMatch) -> Match {
        Match { path: Some(path), ..Match::default() }
    }

    fn get(uri: &str) -> request::Parts {
        Request::get(uri).header("x-a", "1").body(()).unwrap().into_parts().0
    }

    /// Whether one condition alone takes a request.
    fn takes(one: Match, head: &request::Parts) -> bool {
        let rules = [rule(vec![one])];
        assert_eq!(Index::new(&rules).find(head).map(|found| found.rule), search(&rules, head));
        Index::new(&rules).find(head).is_some()
    }

    #[test]
    fn a_prefix_is_whole_path_elements() {
        for (prefix, uri, wanted) in [
            ("/a", "/a", true),
            ("/a", "/a/", true),
            ("/a", "/a/b", true),
            ("/a", "/ab", false),
            ("/a", "/", false),
            ("/a/", "/a", true),
            ("/a", "/b/a", false),
            ("/a/b", "/a/b?c=/d", true),
            ("/", "/anything", true),
        ] {
            assert_eq!(takes(path(PathMatch::Prefix(prefix.into())), &get(uri)), wanted, "{prefix} {uri}");
        }
    }

    #[test]
    fn exact_paths_and_patterns_are_of_the_whole_path_without_its_query() {
        for (one, uri, wanted) in [
            (PathMatch::Exact("/a".into()), "/a?b", true),
            (PathMatch::Exact("/a".into()), "/a/", false),
            (PathMatch::Exact("/a".into()), "/A", false),
            (PathMatch::Regex("/a.".parse().unwrap()), "/ab?c", true),
            (PathMatch::Regex("/a.".parse().unwrap()), "/abc", false),
        ] {
            assert_eq!(takes(path(one.clone()), &get(uri)), wanted, "{one:?} {uri}");
        }
    }

    #[test]
    fn the_query_is_asked_as_it_stands_and_the_first_of_a_name_counts() {
        let query = |name: &str, value| Match { query: vec![(name.into(), value)], ..Match::default() };
        let exact = |value: &str| TextMatch::Exact(value.into());
        for (one, uri, wanted) in [
            (query("a", exact("1")), "/?b=2&a=1", true),
            (query("a", exact("1")), "/?a=2&a=1", false),
            (query("a", exact("")), "/?a", true),
            (query("a", exact("")), "/?b=a", false),
            (query("a", exact("1")), "/", false),
            (query("a", exact("b=c")), "/?a=b=c", true),
            (query("a", TextMatch::Regex("[0-9]+".parse().unwrap())), "/?a=12", true),
            (query("a", TextMatch::Regex("[0-9]+".parse().unwrap())), "/?a=12x", false),
            (query("a", exact("x y")), "/?a=x%20y", false),
        ] {
            assert_eq!(takes(one.clone(), &get(uri)), wanted, "{one:?} {uri}");
        }
    }

    #[test]
    fn a_header_that_came_twice_is_one_value_and_host_is_found_in_http2_too() {
        let header = |name: &str, value: &str| Match {
            headers: vec![(name.into(), TextMatch::Exact(value.into()))],
            ..Match::default()
        };
        let mut head = get("/");
        assert!(takes(header("x-a", "1"), &head));
        assert!(!takes(header("x-b", "1"), &head));
        head.headers.append("x-a", http::HeaderValue::from_static("2"));
        assert!(takes(header("x-a", "1,2"), &head));
        assert!(!takes(header("x-a", "1"), &head));
        let http2 = get("http://web.example/");
        assert_eq!(Index::new(&[rule(vec![header("host", "web.example")])]).find(&http2).map(|f| f.rule), Some(0));
    }

    fn condition() -> impl Strategy<Value = Match> {
        let value = prop_oneof![
            "[12]{1,2}".prop_map(|v| TextMatch::Exact(v.into())),
            Just(TextMatch::Regex("1.*".parse().unwrap())),
        ];
        let path = prop_oneof![
            "(/[ab]{0,2}){1,3}".prop_map(|p| PathMatch::Exact(p.into())),
            "(/[ab]{1,2}){1,3}/?".prop_map(|p| PathMatch::Prefix(p.into())),
            Just(PathMatch::Prefix("/".into())),
            prop::sample::select(vec!["/a.*", "/[^/]+/b", ".*"]).prop_map(|p| PathMatch::Regex(p.parse().unwrap())),
        ];
        let method = prop::sample::select(vec!["GET", "POST"]).prop_map(Arc::from);
        let pairs = || prop::collection::vec(("x-[ab]".prop_map(Arc::from), value.clone()), 0..2);
        (prop::option::weighted(0.9, path), prop::option::weighted(0.3, method), pairs(), pairs())
            .prop_map(|(path, method, headers, query)| Match { path, method, headers, query })
    }

    fn request() -> impl Strategy<Value = request::Parts> {
        let headers = prop::collection::vec(("x-[ab]", "[12]{1,2}"), 0..3);
        ("(/[ab]{0,2}){1,4}", prop::option::of("x-[ab]=[12](&x-[ab]=[12])?"), any::<bool>(), headers).prop_map(
            |(path, query, post, headers)| {
                let query = query.map(|query| format!("?{query}")).unwrap_or_default();
                let request =
                    Request::builder().method(if post { "POST" } else { "GET" }).uri(format!("{path}{query}"));
                headers
                    .into_iter()
                    .fold(request, |r, (name, value)| r.header(name, value))
                    .body(())
                    .unwrap()
                    .into_parts()
                    .0
            },
        )
    }

    proptest! {
        #[test]
        fn the_index_says_what_a_search_of_all_rules_says(
            rules in prop::collection::vec(prop::collection::vec(condition(), 0..3).prop_map(rule), 0..12),
            requests in prop::collection::vec(request(), 8),
        ) {
            // A rule without conditions takes everything: it is left out where it would hide those behind it.
            let rules: Vec<Rule> = rules.into_iter().filter(|rule| !rule.matches.is_empty()).collect();
            let index = Index::new(&rules);
            for head in &requests {
                prop_assert_eq!(index.find(head).map(|found| found.rule), search(&rules, head), "{} {:?}", head.uri, head.headers);
            }
        }
    }
}
