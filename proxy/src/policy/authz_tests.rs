use http::header::HeaderName;
use http::{HeaderValue, request};
use serde_json::{Value, json};

use super::*;

/// Policies as they travel.
fn authz(policies: Value) -> Authz {
    with_default(policies, DefaultAccess::Allow)
}

fn with_default(policies: Value, default: DefaultAccess) -> Authz {
    let policies: Vec<Arc<AuthorizationPolicy>> = serde_json::from_value(policies).unwrap();
    let access = Access { default, policies, ..Access::default() };
    access.check().unwrap();
    Authz::new(&access)
}

fn id(service: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/default/sa/{service}").parse().unwrap()
}

fn caller(id: Option<&SpiffeId>) -> Caller<'_> {
    Caller { id, address: IpAddr::from([127, 0, 0, 1]), port: 8000 }
}

fn head(method: &str, path: &str, headers: &[(&'static str, &'static str)]) -> request::Parts {
    let mut head = http::Request::builder().method(method).uri("/").body(()).unwrap().into_parts().0;
    head.extensions.insert(path.to_string());
    for (name, value) in headers {
        head.headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    head
}

fn asked<'a>(head: &'a request::Parts, claims: Option<&'a Claims>) -> Asked<'a> {
    let path = head.extensions.get::<String>().unwrap();
    Asked { method: &head.method, authority: "web:8000", path, headers: &head.headers, claims }
}

/// `ok`, or why not.
fn said(authz: &Authz, service: Option<&str>, head: &request::Parts) -> String {
    let id = service.map(id);
    match authz.request(&caller(id.as_ref()), &asked(head, None)) {
        Ok(Decision { verdict: Ok(()), .. }) => "ok".into(),
        Ok(Decision { verdict: Err(why), .. }) => why.to_string(),
        Err(ambiguous) => format!("{ambiguous:?}"),
    }
}

fn may(authz: &Authz, service: &str, head: &request::Parts) -> bool {
    said(authz, Some(service), head) == "ok"
}

fn may_connect(authz: &Authz, service: &str) -> bool {
    authz.connection(&caller(Some(&id(service)))).verdict.is_ok()
}

#[test]
fn without_a_policy_the_default_decides() {
    let get = head("GET", "/", &[]);
    for (default, anybody, member) in [
        (DefaultAccess::Allow, true, true),
        (DefaultAccess::MeshOnly, false, true),
        (DefaultAccess::Deny, false, false),
    ] {
        let authz = with_default(json!([]), default);
        assert_eq!((said(&authz, None, &get) == "ok", may(&authz, "web", &get)), (anybody, member), "{default:?}");
    }
}

#[test]
fn empty_rules_mean_what_istio_says_they_mean() {
    let get = head("GET", "/", &[]);
    for (policy, expected) in [
        (json!({"name": "d/p", "action": "ALLOW", "rules": []}), false),
        (json!({"name": "d/p", "action": "ALLOW", "rules": [{}]}), true),
        (json!({"name": "d/p", "action": "DENY", "rules": []}), true),
        (json!({"name": "d/p", "action": "DENY", "rules": [{}]}), false),
        (json!({"name": "d/p", "action": "AUDIT", "rules": [{}]}), true),
    ] {
        let authz = authz(json!([policy]));
        assert_eq!((may(&authz, "web", &get), may_connect(&authz, "web")), (expected, expected), "{policy}");
    }
}

#[test]
fn deny_wins_over_allow_and_allow_over_the_default() {
    let policies = json!([
        {"name": "d/allow", "action": "ALLOW", "rules": [{"from": [{"principals": ["cluster.local/ns/default/sa/a*"]}]}]},
        {"name": "d/deny", "action": "DENY", "rules": [{"from": [{"principals": ["*/sa/ab"]}]}]},
    ]);
    for default in [DefaultAccess::Allow, DefaultAccess::Deny] {
        let authz = with_default(policies.clone(), default);
        let get = head("GET", "/", &[]);
        assert_eq!(said(&authz, Some("aa"), &get), "ok");
        assert_eq!(said(&authz, Some("ab"), &get), "rbac_access_denied_matched_policy[d/deny#0]");
        assert!(said(&authz, Some("b"), &get).contains("matched_policy[none]: no rule of d/allow"), "{default:?}");
        assert!(said(&authz, None, &get).contains("matched_policy[none]"), "nobody in particular");
    }
}

#[test]
fn each_field_of_a_source_must_hold() {
    let get = head("GET", "/", &[]);
    let rule = |from: Value| authz(json!([{"name": "d/p", "action": "ALLOW", "rules": [{"from": [from]}]}]));
    for (from, expected) in [
        (json!({"namespaces": ["default"]}), true),
        (json!({"namespaces": ["other"]}), false),
        (json!({"notNamespaces": ["default"]}), false),
        (json!({"trustDomains": ["cluster.local"]}), true),
        (json!({"trustDomains": ["cluster"]}), false),
        (json!({"ipBlocks": ["127.0.0.0/8"]}), true),
        (json!({"ipBlocks": ["10.0.0.0/8"]}), false),
        (json!({"notIpBlocks": ["127.0.0.1/32"]}), false),
        (json!({"namespaces": ["default"], "ipBlocks": ["10.0.0.0/8"]}), false),
        (json!({"principals": ["*"], "notPrincipals": ["*/sa/web"]}), false),
        (json!({"requestPrincipals": ["*"]}), false),
        (json!({"notRequestPrincipals": ["*"]}), true),
    ] {
        assert_eq!(may(&rule(from.clone()), "web", &get), expected, "{from}");
    }
    assert_eq!(said(&rule(json!({"namespaces": ["*"]})), None, &get).get(..4), Some("rbac"));
}

#[test]
fn methods_are_exact_hosts_have_no_case_and_no_port() {
    let to = |action: &str, to: Value| authz(json!([{"name": "d/p", "action": action, "rules": [{"to": [to]}]}]));
    let get = head("GET", "/", &[]);
    assert!(may(&to("ALLOW", json!({"methods": ["GET", "HEAD"]})), "web", &get));
    assert!(!may(&to("ALLOW", json!({"methods": ["POST"]})), "web", &get));
    assert_eq!(said(&to("DENY", json!({"methods": ["POST"]})), Some("web"), &head("post", "/", &[])), "Method");
    assert!(!may(&to("ALLOW", json!({"notMethods": ["GET"]})), "web", &get));
    assert!(may(&to("ALLOW", json!({"ports": [8000]})), "web", &get));
    assert!(!may(&to("ALLOW", json!({"ports": [80]})), "web", &get));

    let hosts = to("DENY", json!({"hosts": ["admin.example", "*.secret.example"]}));
    let host = |authority: &str| {
        let id = id("web");
        let decided = hosts.request(&caller(Some(&id)), &Asked { authority, ..asked(&get, None) });
        decided.map(|decision| decision.verdict.is_ok())
    };
    for denied in ["admin.example", "ADMIN.example:1", "admin.example.", "admin.example.:80", "a.secret.EXAMPLE:8000"] {
        assert_eq!(host(denied), Ok(false), "{denied}");
    }
    for passes in ["web", "secret.example", "admin.example.org", "[::1]:80", "10.0.0.1:80"] {
        assert_eq!(host(passes), Ok(true), "{passes}");
    }
    for odd in
        ["x@admin.example", "admin.example:80:80", "admin%2eexample", "admin.example..", "", ":80", "[::1", "a:b"]
    {
        assert_eq!(host(odd), Err(Ambiguous::Host), "{odd}");
    }
}

#[test]
fn a_path_must_hold_in_every_reading_to_be_let_in_and_in_one_to_be_kept_out() {
    let allow = authz(json!([{"name": "d/p", "action": "ALLOW", "rules": [{"to": [{"paths": ["/public/*"]}]}]}]));
    let deny =
        authz(json!([{"name": "d/p", "action": "DENY", "rules": [{"to": [{"paths": ["/admin", "/admin/*"]}]}]}]));
    let not_allow = authz(json!([{"name": "d/p", "action": "ALLOW", "rules": [{"to": [{"notPaths": ["/admin*"]}]}]}]));
    let not_deny = authz(json!([{"name": "d/p", "action": "DENY", "rules": [{"to": [{"notPaths": ["/public/*"]}]}]}]));
    for path in ["/admin", "//admin", "/%61dmin", "/admin;x", "/admin/", "/%61dmin;x//"] {
        for authz in [&allow, &deny, &not_allow, &not_deny] {
            assert!(!may(authz, "web", &head("GET", path, &[])), "{path}: {authz:?}");
        }
    }
    for path in ["/public/a", "/public//a", "/public/a;x=1"] {
        for authz in [&allow, &deny, &not_allow, &not_deny] {
            assert!(may(authz, "web", &head("GET", path, &[])), "{path}: {authz:?}");
        }
    }
    assert_eq!(said(&deny, Some("web"), &head("GET", "/public/..%2fadmin", &[])), "Path(\"an escaped slash\")");
}

#[test]
fn a_header_of_which_there_are_two_lets_nobody_in_by_one_of_them() {
    let when =
        |action: &str, when: Value| authz(json!([{"name": "d/p", "action": action, "rules": [{"when": [when]}]}]));
    let team =
        |values: &[&'static str]| head("GET", "/", &values.iter().map(|value| ("x-team", *value)).collect::<Vec<_>>());
    let allow = when("ALLOW", json!({"key": "request.headers[X-Team]", "values": ["red"]}));
    let deny = when("DENY", json!({"key": "request.headers[x-team]", "values": ["blue"]}));
    let not = when("ALLOW", json!({"key": "request.headers[x-team]", "notValues": ["blue"]}));
    for (values, admitted, kept_out, not_blue) in [
        (&["red"][..], true, false, true),
        (&["blue"], false, true, false),
        (&["red", "blue"], false, true, false),
        (&[], false, false, true),
    ] {
        let head = team(values);
        assert_eq!(may(&allow, "web", &head), admitted, "{values:?}");
        assert_eq!(may(&deny, "web", &head), !kept_out, "{values:?}");
        assert_eq!(may(&not, "web", &head), not_blue, "{values:?}");
    }
}

#[test]
fn what_only_requests_have_lets_no_connection_in_and_keeps_it_out() {
    let policy = |action: &str, rule: Value| authz(json!([{"name": "d/p", "action": action, "rules": [rule]}]));
    for rule in [
        json!({"to": [{"methods": ["GET"]}]}),
        json!({"to": [{"paths": ["/x"]}]}),
        json!({"to": [{"hosts": ["x"]}]}),
        json!({"to": [{"notPaths": ["/x"]}]}),
        json!({"when": [{"key": "request.headers[x]", "values": ["1"]}]}),
        json!({"when": [{"key": "request.auth.principal", "notValues": ["1"]}]}),
        json!({"from": [{"requestPrincipals": ["*"]}]}),
        json!({"from": [{"principals": ["*/sa/web"]}], "to": [{"methods": ["GET"]}, {"ports": [8000]}]}),
    ] {
        assert!(!may_connect(&policy("ALLOW", rule.clone()), "web"), "{rule}");
        assert!(!may_connect(&policy("DENY", rule.clone()), "web"), "{rule}");
    }
    let deny = policy("DENY", json!({"from": [{"principals": ["*/sa/evil"]}], "to": [{"methods": ["GET"]}]}));
    assert!(may_connect(&deny, "web"), "what is known of the connection still counts");
    assert!(!may_connect(&deny, "evil"));
    let other_port = policy("DENY", json!({"to": [{"ports": [1], "methods": ["GET"]}]}));
    assert!(may_connect(&other_port, "web"));
    let allow = policy("ALLOW", json!({"from": [{"principals": ["*/sa/web"]}], "to": [{"ports": [8000]}]}));
    assert!(may_connect(&allow, "web") && !may_connect(&allow, "other"));
}

#[test]
fn what_runs_dry_is_told_and_changes_nothing() {
    let authz = authz(json!([
        {"name": "d/dry", "action": "DENY", "dryRun": true, "rules": [{"to": [{"paths": ["/x*"]}]}]},
        {"name": "d/audit", "action": "AUDIT", "rules": [{"to": [{"methods": ["PUT"]}]}]},
    ]));
    let id = id("web");
    let decide = |method: &str, path: &str| {
        let head = head(method, path, &[]);
        let decision = authz.request(&caller(Some(&id)), &asked(&head, None)).unwrap();
        let audit = decision.audit.map(|rule| rule.to_string());
        (decision.verdict.is_ok(), decision.dry_run.map(|dry| dry.map_err(|why| why.to_string())), audit)
    };
    assert_eq!(decide("GET", "/y"), (true, Some(Ok(())), None));
    let would = "rbac_access_denied_matched_policy[d/dry#0]".to_string();
    assert_eq!(decide("GET", "/x"), (true, Some(Err(would.clone())), None));
    assert_eq!(decide("GET", "/x%2f"), (true, Some(Err(would)), None), "nobody is refused for what runs dry");
    assert_eq!(decide("PUT", "/y"), (true, Some(Ok(())), Some("d/audit#0".into())));
}

#[test]
fn claims_are_texts_booleans_whole_numbers_and_lists_of_them() {
    let claims = json!({"iss": "https://i", "sub": "me", "aud": ["a", "b"], "scope": "read write", "n": 1,
        "realm": {"roles": ["admin"]}, "note": "read write"});
    let Value::Object(claims) = claims else { unreachable!() };
    let claims = Claims::new(claims);
    let get = head("GET", "/", &[]);
    for (key, value, expected) in [
        ("request.auth.claims[aud]", "b", true),
        ("request.auth.audiences", "c", false),
        ("request.auth.audiences", "a", true),
        ("request.auth.claims[scope]", "write", true),
        ("request.auth.claims[note]", "write", false),
        ("request.auth.claims[n]", "1", true),
        ("request.auth.claims[realm][roles]", "admin", true),
        ("request.auth.claims[realm][roles][admin]", "*", false),
        ("request.auth.principal", "https://i/me", true),
        ("request.auth.principal", "https://i/*", true),
        ("request.auth.claims[none]", "*", false),
    ] {
        let allow = json!([{"name": "d/p", "action": "ALLOW", "rules": [{"when": [{"key": key, "values": [value]}]}]}]);
        let authz = authz(allow);
        let decision = authz.request(&caller(None), &asked(&get, Some(&claims))).unwrap();
        assert_eq!(decision.verdict.is_ok(), expected, "{key} {value}");
        assert!(authz.request(&caller(None), &asked(&get, None)).unwrap().verdict.is_err(), "no token, no claim");
    }
}

#[test]
fn a_claim_that_no_text_can_be_held_against_lets_nobody_in_and_keeps_everybody_out() {
    let claims = json!({"iss": "https://i", "sub": "me", "suspended": {"since": 1}, "barred": true,
        "orgs": [{"role": "banned"}], "org": {"role": "true"}, "no": null});
    let Value::Object(claims) = claims else { unreachable!() };
    let claims = Claims::new(claims);
    let get = head("GET", "/", &[]);
    let decide = |action: &str, when: Value| {
        let authz = authz(json!([{"name": "d/p", "action": action, "rules": [{"when": [when]}]}]));
        authz.request(&caller(None), &asked(&get, Some(&claims))).unwrap().verdict.is_ok()
    };
    for (key, words, denied, allowed) in [
        ("suspended", "values", true, false),
        ("suspended", "notValues", true, false),
        ("barred", "values", true, true),
        ("barred", "notValues", false, false),
        ("none", "values", false, false),
        ("orgs][role", "values", true, false),
        ("orgs][role", "notValues", true, false),
        ("barred][role", "values", true, false),
        ("org][role", "values", true, true),
        ("org][none", "values", false, false),
        ("no][role", "values", false, false),
        ("none][role", "notValues", true, true),
    ] {
        let mut when = json!({"key": format!("request.auth.claims[{key}]")});
        when[words] = json!(["true"]);
        assert_eq!(!decide("DENY", when.clone()), denied, "DENY {when}");
        assert_eq!(decide("ALLOW", when.clone()), allowed, "ALLOW {when}");
    }
}
