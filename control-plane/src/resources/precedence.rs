//! Which condition is asked first where several could hold: the Gateway API's order.

use std::cmp::Reverse;

use sheetbend_control_plane_client::model::{Match, PathMatch};

use super::Route;

/// A condition, and how it stands among others of its kind of route.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Ranked {
    rank: Rank,
    pub(crate) condition: Match,
}

/// Compared from the left; the larger one is asked first.
pub(crate) type Rank = [usize; 5];

impl Ranked {
    /// HTTPRouteRule, "Proxy or Load Balancer routing configuration generated from HTTPRoutes MUST prioritize": an exact
    /// path, the longest prefix, a method, the most headers, the most query parameters.
    ///
    /// Where regular expressions stand is for implementations to say: between exact paths and prefixes, the longer before
    /// the shorter.
    pub(crate) fn http(condition: Match) -> Self {
        let (kind, length) = match &condition.path {
            Some(PathMatch::Exact(path)) => (2, path.chars().count()),
            Some(PathMatch::Regex(pattern)) => (1, pattern.as_str().chars().count()),
            Some(PathMatch::Prefix(path)) => (0, path.chars().count()),
            // As long as none: the prefix `/`, which a rule without matches stands for too.
            None => (0, 0),
        };
        let method = usize::from(condition.method.is_some());
        Self { rank: [kind, length, method, condition.headers.len(), condition.query.len()], condition }
    }

    /// GRPCRouteRule: the most characters in a service, in a method, the most headers. A regular expression stands behind
    /// every exact name, and before a condition on headers alone.
    pub(crate) fn grpc(regex: bool, service: &str, method: &str, condition: Match) -> Self {
        let (service, method) = (service.chars().count(), method.chars().count());
        let kind = match (regex, service + method) {
            (_, 0) => 0,
            (true, _) => 1,
            (false, _) => 2,
        };
        Self { rank: [kind, service, method, condition.headers.len(), 0], condition }
    }

    /// The rank of a rule without conditions.
    pub(crate) const EVERYTHING: Rank = [0, 0, 0, 0, 0];

    /// Where it stands: smaller is asked first.
    pub(crate) fn order(&self) -> Reverse<Rank> {
        Reverse(self.rank)
    }
}

/// Ties between routes: the oldest, then `namespace/name`. What has no time of creation is younger than all that has.
pub(crate) fn in_order_of_age<'a>(routes: impl Iterator<Item = &'a Route>) -> Vec<&'a Route> {
    let mut routes: Vec<&Route> = routes.collect();
    let age = |route: &&Route| (route.created.is_none(), route.created);
    let name = |route: &&Route| format!("{}/{}", route.name.namespace, route.name.service);
    routes.sort_by(|a, b| age(a).cmp(&age(b)).then_with(|| name(a).cmp(&name(b))));
    routes
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use sheetbend_control_plane_client::model::{ServiceName, TextMatch};

    use super::*;

    fn http(path: Option<PathMatch>, method: bool, headers: usize, query: usize) -> Ranked {
        let values = |n: usize| (0..n).map(|n| (Arc::from(format!("n{n}")), TextMatch::Exact("v".into()))).collect();
        let method = method.then(|| "GET".into());
        Ranked::http(Match { path, method, headers: values(headers), query: values(query) })
    }

    fn exact(path: &str) -> Option<PathMatch> {
        Some(PathMatch::Exact(path.into()))
    }

    fn prefix(path: &str) -> Option<PathMatch> {
        Some(PathMatch::Prefix(path.into()))
    }

    fn regex(path: &str) -> Option<PathMatch> {
        Some(PathMatch::Regex(path.parse().unwrap()))
    }

    /// Each stands before all that follow it.
    fn http_table() -> Vec<Ranked> {
        vec![
            http(exact("/a"), true, 0, 0),
            http(exact("/a"), false, 2, 0),
            http(exact("/a"), false, 1, 5),
            http(exact("/a"), false, 0, 1),
            http(exact("/a"), false, 0, 0),
            http(regex("/[a-z]+"), false, 0, 0),
            http(regex("/.*"), true, 9, 9),
            http(prefix("/a/b/c"), false, 0, 0),
            http(prefix("/a/b"), true, 0, 0),
            http(prefix("/a/b"), false, 3, 0),
            http(prefix("/a/b"), false, 0, 3),
            http(prefix("/a/b"), false, 0, 0),
            // Characters, not bytes: three, and five bytes.
            http(prefix("/\u{e9}\u{e9}"), true, 9, 9),
            http(None, true, 0, 0),
            http(None, false, 1, 0),
            http(None, false, 0, 16),
            http(None, false, 0, 0),
        ]
    }

    fn grpc_table() -> Vec<Ranked> {
        let one = |regex, service: &str, method: &str, headers: usize| {
            let Ranked { condition, .. } = http(None, false, headers, 0);
            Ranked::grpc(regex, service, method, condition)
        };
        vec![
            one(false, "shop.Catalog", "", 0),
            one(false, "shop.Cart", "AddItem", 0),
            one(false, "shop.Cart", "Add", 2),
            one(false, "shop.Cart", "Add", 0),
            one(false, "shop.Cart", "", 16),
            one(false, "", "AddItem", 0),
            one(true, "shop[.]Catalog.*", ".*", 0),
            one(true, "", "Add.*", 3),
            one(false, "", "", 3),
            one(false, "", "", 0),
        ]
    }

    proptest! {
        #[test]
        fn conditions_are_asked_in_the_order_of_the_specification(
            shuffled in Just(http_table()).prop_shuffle(),
            grpc in Just(grpc_table()).prop_shuffle(),
        ) {
            for (mut found, wanted) in [(shuffled, http_table()), (grpc, grpc_table())] {
                found.sort_by_key(Ranked::order);
                prop_assert_eq!(found, wanted);
            }
        }
    }

    #[test]
    fn of_routes_that_are_alike_the_oldest_comes_first_and_then_the_first_by_name() {
        let route = |namespace: &str, name: &str, created: Option<&str>| Route {
            kind: "HTTPRoute",
            name: ServiceName { service: name.into(), namespace: namespace.into() },
            created: created.map(|text| text.parse().unwrap()),
            parents: vec![],
            hostnames: vec![],
            rules: vec![],
        };
        let routes = [
            route("b", "a", None),
            route("a", "z", Some("2026-03-01T00:00:00Z")),
            route("a-1", "a", None),
            route("a", "b", None),
            route("z", "z", Some("2025-03-01T00:00:00+01:00")),
            route("z", "y", Some("2025-02-28T23:00:00Z")),
        ];
        let names: Vec<String> =
            in_order_of_age(routes.iter()).iter().map(|r| format!("{}/{}", r.name.namespace, r.name.service)).collect();
        assert_eq!(names, ["z/y", "z/z", "a/z", "a-1/a", "a/b", "b/a"]);
    }
}
