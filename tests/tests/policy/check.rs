//! `sheetbend check`: each mistake has its own words, place and hint.

use serde_json::Value;
use sheetbend_tests::{Finished, Mesh};

const WEB: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 80}]}\n---\n";

/// An HTTPRoute of `web` with these rules, which begin on its seventh line.
fn route(name: &str, rules: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}}}\nspec:\n  \
         parentRefs: [{{kind: Service, group: '', name: web}}]\n  rules:\n{rules}"
    )
}

/// A BackendPolicy of `web`; what it says begins on its sixth line.
fn policy(name: &str, says: &str) -> String {
    format!(
        "apiVersion: sheetbend.io/v1alpha1\nkind: BackendPolicy\nmetadata: {{name: {name}}}\nspec:\n  \
         targetRefs: [{{kind: Service, name: web}}]\n{says}"
    )
}

/// Checks a folder of these files beside the Service `web`.
fn check(files: &[(&str, &str)], more: &[&str]) -> Finished {
    let mesh = Mesh::local();
    let folder = mesh.folder().join("resources");
    std::fs::create_dir_all(&folder).expect("a folder");
    for (name, text) in files.iter().chain(&[("web.yaml", WEB)]) {
        std::fs::write(folder.join(name), text).expect("the file is written");
    }
    let mut said = mesh.finish([&["check", folder.to_str().expect("a path of UTF-8")], more].concat());
    said.stdout = said.stdout.replace(&format!("{}/", folder.display()), "");
    said
}

#[test]
fn good_resources_pass() {
    let good = route("a", "  - backendRefs: [{name: web, port: 80}]\n");
    let said = check(&[("a.yaml", &good)], &[]);
    assert_eq!((said.status.code(), said.stdout.as_str()), (Some(0), "2 files, 2 good resources, nothing wrong\n"));
}

#[test]
fn each_mistake_has_its_place_its_reason_and_a_hint() {
    let rule = |text: &str| route("a", &format!("  - backendRefs: [{{name: web, port: 80}}]\n    {text}\n"));
    let backends = |text: &str| route("a", &format!("  - backendRefs: [{text}]\n"));
    let mistakes = [
        (rule("tiemouts: {}"), "a.yaml:8:5: unknown field `tiemouts`; did you mean `timeouts`?"),
        (
            rule("matches: [{path: {type: RegularExpression, value: '/(a'}}]"),
            "a.yaml:8:55: bad regular expression `/(a`: unclosed group; patterns are RE2's",
        ),
        (rule("matches: [{path: {value: a}}]"), "a.yaml:8:30: the path `a` does not begin with /"),
        (rule("timeouts: {request: -1s}"), "a.yaml:8:25: `-1s` is not a duration: write one like 250ms"),
        (
            rule("timeouts: {request: 1s, backendRequest: 2s}"),
            "timeouts.backendRequest: it is longer than timeouts.request",
        ),
        (
            backends("{name: web, port: 80, weight: 0}"),
            "a.yaml:7:26: the weights of this rule's backends sum to zero: it answers nothing; give one of them a weight",
        ),
        (backends("{name: web}"), "a.yaml:7:26: this backendRef has no `port`; a Service needs one"),
        (
            backends("{name: wed, port: 80}"),
            "a.yaml:7:26: missing backend: there is no Service default/wed; did you mean `web`?",
        ),
        (
            backends("{name: web, port: 81}"),
            "a.yaml:7:26: missing backend: Service default/web has no port 81; it has 80",
        ),
        (
            backends("{name: web, port: 80}").replace("name: web}", "name: shop}"),
            "a.yaml:5:49: this route is attached to nothing: there is no Service default/shop; add the Service",
        ),
        (policy("a", "  outlierDetection: {baseEjectionTime: 1.5s}\n"), "a.yaml:6:40: `1.5s` is not a duration"),
        (
            policy("a", "").replace("BackendPolicy", "BackendPolice"),
            "a.yaml:2:7: `BackendPolice` is not a kind that is read here; did you mean",
        ),
        (
            policy("a", "").replace("v1alpha1", "v1"),
            "a.yaml:1:13: BackendPolicy of sheetbend.io/v1 is not known here; write apiVersion: sheetbend.io/v1alpha1",
        ),
        ("kind: [".to_string(), "a.yaml:1:"),
        (WEB.replace("80", "0"), "a.yaml:4:23: port 0 cannot be reached; ports go from 1 to 65535"),
        (WEB.to_string(), "web.yaml:1:1: Service default/web is already in a.yaml:1; take one of the two out"),
    ];
    for (text, wanted) in mistakes {
        let said = check(&[("a.yaml", &text)], &[]);
        assert_eq!(said.status.code(), Some(1), "{text}\n{}", said.stdout);
        assert!(said.stdout.contains(wanted), "{text}\nwanted: {wanted}\nsaid: {}", said.stdout);
    }
}

#[test]
fn of_what_cannot_hold_together_the_loser_is_told_and_who_wins() {
    let rule = "  - matches: [{path: {value: /a}}]\n    backendRefs: [{name: web, port: 80}]\n";
    let said = check(&[("a.yaml", &route("one", rule)), ("b.yaml", &route("two", rule))], &[]).stdout;
    assert!(
        said.contains("b.yaml:7:1: the rule default/two#0 cannot hold beside default/one#0 (a.yaml:7): both match"),
        "{said}"
    );
    let said = check(&[("a.yaml", &policy("one", "")), ("b.yaml", &policy("two", ""))], &[]).stdout;
    assert!(said.contains("Service default/web has another BackendPolicy"), "{said}");
}

#[test]
fn every_mistake_of_every_file_is_told_in_text_and_in_json() {
    let wrong =
        route("a", "  - bakcendRefs: []\n    timeouts: {request: -1s}\n    backendRefs: [{name: wed, port: 0}]\n");
    let other = format!("{}---\n{}", WEB.replace("80", "0").replace("web", "two"), policy("p", "  outlier: {}\n"));
    let files = [("a.yaml", wrong.as_str()), ("b.yaml", other.as_str())];
    let said = check(&files, &[]).stdout;
    for place in ["a.yaml:7:5:", "a.yaml:8:25:", "a.yaml:9:37:", "b.yaml:4:23:", "b.yaml:12:3:"] {
        assert!(said.lines().any(|line| line.starts_with(place)), "{place}\n{said}");
    }
    let json: Value = serde_json::from_str(&check(&files, &["-o", "json"]).stdout).expect("JSON");
    assert_eq!(json["problems"].as_array().map(Vec::len), Some(said.lines().count() - 1), "{json:#}");
    assert_eq!((&json["problems"][0]["line"], &json["problems"][0]["column"]), (&7.into(), &5.into()), "{json:#}");
}

#[test]
fn what_only_sidecars_register_is_known_where_it_is_named() {
    let route = route("a", "  - backendRefs: [{name: cart, port: 9000}]\n");
    assert_eq!(check(&[("a.yaml", &route)], &[]).status.code(), Some(1));
    for named in ["cart", "cart:9000", "cart.default:9000"] {
        assert_eq!(check(&[("a.yaml", &route)], &["--service", named]).status.code(), Some(0), "{named}");
    }
    assert_eq!(check(&[("a.yaml", &route)], &["--service", "cart:9001"]).status.code(), Some(1));
}

#[test]
fn a_folder_that_is_not_there_is_said() {
    let said = Mesh::local().finish(["check", "/nowhere/at/all"]);
    assert_eq!(said.status.code(), Some(1));
    assert!(said.stderr.contains("/nowhere/at/all"), "{}", said.stderr);
}
