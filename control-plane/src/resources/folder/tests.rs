//! What a folder says while it changes.

use super::*;

const SERVICE: &str =
    "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  ports:\n  - {port: 80, targetPort: 8000}\n";

fn folder() -> (tempfile::TempDir, Folder) {
    let dir = tempfile::tempdir().unwrap();
    let folder = Folder::new(dir.path().into(), "cluster.local");
    (dir, folder)
}

fn refused(text: &str) -> String {
    let (dir, mut folder) = folder();
    fs::write(dir.path().join("a.yaml"), text).unwrap();
    let (_, refusals) = folder.reload(Instant::now()).unwrap();
    assert!(!refusals.is_empty(), "must be refused: {text}");
    let text = refusals[0].to_string();
    text.split("a.yaml").nth(1).unwrap().to_string()
}

#[test]
fn a_bad_file_is_refused_with_its_place_while_its_last_good_state_stays() {
    let (dir, mut folder) = folder();
    let file = dir.path().join("web.yaml");
    fs::write(&file, SERVICE).unwrap();
    assert_eq!(folder.reload(Instant::now()).unwrap(), (true, Vec::new()));
    fs::write(
        &file,
        format!(
            "{SERVICE}---\napiVersion: v1\nkind: Service\nmetadata: {{name: two}}\nspec: {{ports: [{{port: 0}}]}}\n"
        ),
    )
    .unwrap();
    let (changed, refusals) = folder.reload(Instant::now()).unwrap();
    assert!(!changed);
    assert_eq!((refusals[0].line, refusals[0].column), (11, 23), "{}", refusals[0]);
    assert!(refusals[0].to_string().contains("port 0 cannot be reached"));
    assert_eq!(folder.resources().count(), 1, "the last good state stays");
    assert_eq!(folder.reload(Instant::now()).unwrap(), (false, Vec::new()), "told once");
}

#[test]
fn what_is_empty_is_believed_at_the_second_look() {
    let (dir, mut folder) = folder();
    let (file, other) = (dir.path().join("web.yaml"), dir.path().join("other.yaml"));
    fs::write(&file, SERVICE).unwrap();
    fs::write(&other, SERVICE.replace("web", "other")).unwrap();
    let now = Instant::now();
    assert!(folder.reload(now).unwrap().0);
    fs::write(&file, "").unwrap();
    assert_eq!(folder.reload(now).unwrap(), (false, Vec::new()), "it may be about to be written");
    fs::write(&file, SERVICE).unwrap();
    assert_eq!(folder.reload(now + SETTLES).unwrap(), (false, Vec::new()));
    fs::write(&file, "").unwrap();
    assert!(!folder.reload(now).unwrap().0);
    assert!(folder.reload(now + SETTLES).unwrap().0);
    assert_eq!(folder.resources().count(), 1);
    // One file that goes is gone; that all go may be a mount.
    fs::remove_file(&file).unwrap();
    fs::remove_file(&other).unwrap();
    assert_eq!(folder.reload(now).unwrap(), (false, Vec::new()));
    assert_eq!(folder.resources().count(), 1);
    assert!(folder.reload(now + SETTLES).unwrap().0);
    assert_eq!(folder.resources().count(), 0);
}

#[test]
fn a_file_that_gets_another_name_and_a_mistake_says_what_it_said() {
    let (dir, mut folder) = folder();
    let (a, b) = (dir.path().join("a.yaml"), dir.path().join("b.yaml"));
    fs::write(&a, SERVICE).unwrap();
    folder.reload(Instant::now()).unwrap();
    fs::remove_file(&a).unwrap();
    fs::write(&b, SERVICE.replace("port: 80,", "port: 0,")).unwrap();
    let (changed, problems) = folder.reload(Instant::now()).unwrap();
    assert!(!changed);
    assert_eq!((problems.len(), folder.resources().count()), (2, 1), "{problems:?}");
    assert!(problems[1].to_string().contains("a.yaml:1:1: gone, and what it said stays while"), "{}", problems[1]);
    assert_eq!(folder.reload(Instant::now()).unwrap(), (false, Vec::new()), "told once");
    fs::write(&b, SERVICE.replace("8000", "8001")).unwrap();
    assert_eq!(folder.reload(Instant::now()).unwrap(), (true, Vec::new()));
    assert_eq!((folder.files().len(), folder.resources().count()), (1, 1));
}

#[test]
fn files_beyond_those_that_are_read_are_told() {
    let (dir, mut folder) = folder();
    for number in 0..MAX_FILES + 2 {
        fs::write(dir.path().join(format!("{number:05}.yaml")), "").unwrap();
    }
    let (_, problems) = folder.reload(Instant::now()).unwrap();
    assert_eq!(problems.len(), 1);
    assert!(problems[0].to_string().contains("02000.yaml:1:1: not read, as 1 others are not"), "{}", problems[0]);
    assert_eq!(folder.reload(Instant::now()).unwrap(), (false, Vec::new()), "told once");
}

#[test]
fn what_is_no_file_holds_nobody_up() {
    assert_eq!(read(Path::new("/dev/zero")).unwrap_err().reason, "not a file");
    assert!(read(Path::new("/nowhere")).unwrap_err().reason.contains("cannot be read"));
}

#[test]
fn a_typo_is_refused_with_what_was_probably_meant() {
    let settings = "apiVersion: sheetbend.io/v1alpha1\nkind: MeshSettings\nmetadata: {name: mesh}\nspec:\n";
    let text = refused(&format!("{settings}  meshRange: [10.0.0.0/8]\n"));
    assert!(text.starts_with(":5:3: unknown field `meshRange`; did you mean `meshRanges`?"), "{text}");
    let text = refused(&format!("{settings}  meshRanges: [10.0.0.0/8, 10.0.0.0/99]\n"));
    assert!(text.starts_with(":5:28: `10.0.0.0/99` is not a range"), "{text}");
    let text = refused(&format!("{settings}  trustDomain: other.example\n"));
    assert!(text.contains("is not the CA's, which is cluster.local"), "{text}");
    let text = refused("apiVersion: v1\nkind: Sevice\nmetadata: {name: web}\n");
    assert!(text.starts_with(":2:7: `Sevice` is not a kind that is read here; did you mean `Service`?"), "{text}");
    let text = refused("apiVersion: v1\nkind: [\n");
    assert!(text.starts_with(':'), "{text}");
}

#[test]
fn what_the_parser_cannot_take_is_told_in_plain_words() {
    let route = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web}\nspec:\n  parentRefs: [{kind: Service, name: web}]\n  rules:\n  - backendRefs: ";
    for (backends, wanted) in [
        ("[{name: web, port: 80, weight: -1}]", ":7:49: not a whole number of 0 or more; write digits alone"),
        ("[{name: web, port: 99999}]", ":7:37: not a number from 0 to 65535; write a whole number"),
        ("{name: web}", "not a list; write `[one, two]`"),
        ("[web]", "not an object; write `{key: value}`"),
        ("[{name: web, name: two, port: 80}]", "the key `name` is there twice; take one of the two out"),
        ("[{port: 80}]", "missing field `name`; it cannot be left out"),
    ] {
        let text = refused(&format!("{route}{backends}\n"));
        assert!(text.contains(wanted), "{backends}: {text}");
    }
}

#[test]
fn a_field_that_is_not_obeyed_is_refused_rather_than_ignored() {
    let route = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web}\nspec:\n  parentRefs: [{kind: Service, name: web}]\n  rules:\n";
    let text = refused(&format!("{route}  - sessionPersistence: {{}}\n"));
    assert!(text.starts_with(":7:5: unknown field `sessionPersistence`; the Gateway API has this field"), "{text}");
}

#[test]
fn a_condition_that_cannot_be_asked_is_refused_at_its_place_with_a_hint() {
    let http = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web}\nspec:\n  parentRefs: [{kind: Service, name: web}]\n  rules:\n  - backendRefs: [{name: web, port: 80}]\n    matches:\n    - ";
    let grpc = http.replace("HTTPRoute", "GRPCRoute");
    let cases = [
        (
            http,
            "path: {type: RegularExpression, value: '/(a'}",
            ":9:46: bad regular expression `/(a`: unclosed group; patterns are RE2's",
        ),
        (http, "path: {type: RegularExpression, value: '((a{100}){100}){100}'}", "too large when compiled"),
        (
            http,
            "path: {type: Regex, value: /a}",
            ":9:20: `Regex` is no type of path; write Exact, PathPrefix or RegularExpression",
        ),
        (http, "path: {value: a}", "the path `a` does not begin with /"),
        (http, "path: {value: /a?b=c}", "`/a?b=c` is more than a path; match the query with queryParams"),
        (http, "path: {value: /a/../b}", "not in its normal form"),
        (http, "method: get", "`get` is not a method; write it in upper case"),
        (http, "headers: [{name: x a, value: b}]", "`x a` is not a header's name"),
        (http, "headers: [{name: A, value: b}, {name: a, value: c}]", ":9:45: two conditions on `a`"),
        (http, "headers: [{name: a, type: Prefix, value: b}]", "`Prefix` is no type of match"),
        (http, "queryParams: [{name: a, type: RegularExpression, value: '*'}]", "bad regular expression `*`"),
        (http, "queryParams: [{name: a=b, value: c}]", "`a=b` is not a query parameter's name"),
        (&grpc, "method: {type: Exact}", "neither a service nor a method"),
        (&grpc, "method: {service: a/b}", "`a/b` is not a gRPC service or method"),
        (&grpc, "method: {type: RegularExpression, service: 'a)|(b'}", "bad regular expression `a)|(b`"),
    ];
    for (route, condition, wanted) in cases {
        let text = refused(&format!("{route}{condition}\n"));
        assert!(text.contains(wanted), "{condition}: {text}");
    }
}

#[test]
fn what_the_specification_forbids_of_filters_and_backends_is_refused_at_its_place_with_a_hint() {
    let http = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web}\nspec:\n  parentRefs: [{kind: Service, name: web}]\n  rules:\n  - ";
    let to = "backendRefs: [{name: web, port: 80}]\n    ";
    let redirect = "{type: RequestRedirect, requestRedirect: {hostname: a.example}}";
    let rewrite = "{type: URLRewrite, urlRewrite: {hostname: a.example}}";
    let set = |name: &str| {
        format!("{{type: RequestHeaderModifier, requestHeaderModifier: {{set: [{{name: {name}, value: b}}]}}}}")
    };
    let prefix = "{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /a}}}";
    let cases = [
        (format!("{to}filters: [{redirect}]"), ":7:26: a redirected request is not forwarded; take the"),
        (format!("filters: [{redirect}, {rewrite}]"), "RequestRedirect and URLRewrite cannot both be obeyed"),
        (format!("{to}filters: [{rewrite}, {rewrite}]"), "two filters of type URLRewrite; write what both say"),
        (format!("{to}filters: [{{type: RequestMirror}}]"), "a filter of type `RequestMirror` is not obeyed here"),
        (format!("{to}filters: [{{type: URLRewrite}}]"), "has not its own field"),
        (format!("{to}filters: [{}]", set("Host")), ":8:82: `host` is not edited as a header: write a filter"),
        (format!("{to}filters: [{}]", set("Connection")), "is of the connection, not of the message"),
        (format!("{to}filters: [{}]", set("sheetbend-unsent")), "is of the connection, not of the message"),
        (format!("{to}filters: [{}]", set("'a b'")), "`a b` is not a header's name"),
        (format!("{to}filters: [{prefix}]"), "and no single prefix that the rule matches; write one match"),
        (format!("{to}filters: [{prefix}]\n    matches: [{{path: {{type: Exact, value: /b}}}}]"), "no single prefix"),
        ("filters: [{type: RequestRedirect, requestRedirect: {statusCode: 304}}]".into(), "304 sends nobody elsewhere"),
        ("filters: [{type: RequestRedirect, requestRedirect: {scheme: ftp}}]".into(), "write http or https"),
        (
            "backendRefs: [{name: web, port: 80, weight: 0}]".into(),
            ":7:26: the weights of this rule's backends sum to zero",
        ),
        ("backendRefs: []".into(), "a rule without a backend answers nothing"),
        (
            format!("backendRefs: [{{name: web, port: 80, filters: [{redirect}]}}]"),
            "`RequestRedirect` is not obeyed here",
        ),
    ];
    for (rule, wanted) in cases {
        let text = refused(&format!("{http}{rule}\n"));
        assert!(text.contains(wanted), "{rule}: {text}");
    }
}

#[test]
fn a_fault_that_cannot_happen_is_refused_at_its_place_with_a_hint() {
    let fault = "apiVersion: sheetbend.io/v1alpha1\nkind: FaultInjection\nmetadata: {name: chaos}\nspec:\n  ";
    let to = "targetRefs: [{kind: Service, name: web}]\n  ";
    let cases = [
        (String::new() + to, "neither a delay nor an abort"),
        ("targetRefs: []\n  abort: {percentage: {value: 1}, httpStatus: 503}".into(), ":5:15: no targetRef"),
        (format!("{to}abort: {{httpStatus: 503}}"), ":6:10: no percentage: of how many requests?; write percentage:"),
        (format!("{to}abort: {{percentage: {{value: 101}}, httpStatus: 503}}"), "101 is not between 0 and 100"),
        (format!("{to}abort: {{percentage: {{value: 1}}}}"), "no status: write httpStatus or grpcStatus"),
        (format!("{to}abort: {{percentage: {{value: 1}}, httpStatus: 99}}"), "99 is not a status"),
        (format!("{to}abort: {{percentage: {{value: 1}}, grpcStatus: BUSY}}"), "`BUSY` is no gRPC status"),
        (format!("{to}delay: {{percentage: {{value: 1}}, fixedDelay: 0s}}"), "write one between 1ms and 1h"),
        (format!("{to}delay: {{percentage: {{value: 1}}, fixedDelay: -1s}}"), "is not a duration"),
        (
            format!("{to}delays: {{}}\n  abort: {{percentage: {{value: 1}}, httpStatus: 503}}"),
            "unknown field `delays`; did you mean `delay`?",
        ),
    ];
    for (spec, wanted) in cases {
        let text = refused(&format!("{fault}{spec}\n"));
        assert!(text.contains(wanted), "{spec}: {text}");
    }
}

#[test]
fn a_policy_that_cannot_be_obeyed_is_refused_at_its_place() {
    let policy = "apiVersion: sheetbend.io/v1alpha1\nkind: BackendPolicy\nmetadata: {name: web}\nspec:\n  targetRefs: [{kind: Service, name: web}]\n";
    let text = refused(&format!("{policy}  outlierDetection: {{baseEjectionTime: 1.5s}}\n"));
    assert!(text.starts_with(":6:40: `1.5s` is not a duration"), "{text}");
    let text = refused(&format!("{policy}  outlierDetection: {{baseEjectionTime: 2s, maxEjectionTime: 1s}}\n"));
    assert!(text.starts_with(":6:21: outlierDetection.maxEjectionTime: it is shorter"), "{text}");
    let text = refused(&format!("{policy}  outlierDetection: {{consecutive5xxError: 2}}\n"));
    assert!(text.contains("unknown field `consecutive5xxError`; did you mean `consecutive5xxErrors`?"), "{text}");
    let route = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web}\nspec:\n  parentRefs: [{kind: Service, name: web}]\n  rules:\n";
    let text = refused(&format!(
        "{route}  - backendRefs: [{{name: web, port: 80}}]\n    timeouts: {{request: 1s, backendRequest: 2s}}\n"
    ));
    assert!(text.starts_with(":8:45: timeouts.backendRequest: it is longer"), "{text}");
}

#[test]
fn the_same_resource_in_two_files_is_refused_until_one_is_gone() {
    let (dir, mut folder) = folder();
    fs::write(dir.path().join("a.yaml"), SERVICE).unwrap();
    fs::write(dir.path().join("b.yaml"), SERVICE).unwrap();
    let (_, refusals) = folder.reload(Instant::now()).unwrap();
    assert!(refusals[0].to_string().contains("Service default/web is already in"), "{}", refusals[0]);
    fs::remove_file(dir.path().join("a.yaml")).unwrap();
    folder.reload(Instant::now()).unwrap();
    assert_eq!(folder.files().values().filter(|f| !f.problems().is_empty()).count(), 0);
    assert_eq!(folder.resources().count(), 1);
}

const OTHER: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: other}\nspec: {ports: [{port: 1}]}\n";

fn deny(name: &str) -> String {
    format!(
        "---\napiVersion: sheetbend.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}}}\nspec: {{action: \
         DENY, rules: [{{}}]}}\n"
    )
}

/// What counts, in the order of names.
fn keys(folder: &Folder) -> Vec<String> {
    let mut keys: Vec<String> = folder.resources().map(Resource::key).collect();
    keys.sort_unstable();
    keys
}

#[test]
fn what_moves_to_another_file_stays_in_force_whichever_is_read_first_and_however_it_is_saved() {
    for (from, to) in [("a.yaml", "z.yaml"), ("z.yaml", "a.yaml")] {
        for saves in 1..=3 {
            let (dir, mut folder) = folder();
            let (from, to) = (dir.path().join(from), dir.path().join(to));
            fs::write(&from, format!("{SERVICE}{}", deny("deny-x"))).unwrap();
            fs::write(&to, OTHER).unwrap();
            let all = ["AuthorizationPolicy default/deny-x", "Service default/other", "Service default/web"];
            let mut look = || {
                folder.reload(Instant::now()).unwrap();
                assert_eq!(keys(&folder), all, "{} in {saves}", from.display());
                folder.files().values().map(|file| file.problems().len()).sum::<usize>()
            };
            look();
            fs::write(&to, format!("{OTHER}{}", deny("deny-x"))).unwrap();
            if saves > 1 {
                assert_eq!(look(), 1, "it is there twice");
            }
            if saves > 2 {
                assert_eq!(look(), 1);
            }
            fs::write(&from, SERVICE).unwrap();
            assert_eq!((look(), look()), (0, 0));
            assert!(folder.files()[&to].resources().any(|resource| resource.key().contains("deny-x")));
        }
    }
}

#[test]
fn two_resources_change_their_files_in_one_save() {
    let (dir, mut folder) = folder();
    let (a, b) = (dir.path().join("a.yaml"), dir.path().join("b.yaml"));
    for (first, second) in [("one", "the-other"), ("the-other", "one")] {
        fs::write(&a, deny(first)).unwrap();
        fs::write(&b, deny(second)).unwrap();
        assert_eq!(folder.reload(Instant::now()).unwrap(), (true, Vec::new()));
        assert_eq!(keys(&folder), ["AuthorizationPolicy default/one", "AuthorizationPolicy default/the-other"]);
        assert!(folder.files()[&a].resources().any(|resource| resource.key().ends_with(first)));
    }
}

#[test]
fn what_a_file_with_a_mistake_gives_up_stays_in_it_and_in_the_way_of_others() {
    let (dir, mut folder) = folder();
    let (b, c) = (dir.path().join("b.yaml"), dir.path().join("c.yaml"));
    let (wrong, all) = (SERVICE.replace("port: 80,", "port: 0,"), ["AuthorizationPolicy default/deny-x"]);
    fs::write(&b, deny("deny-x")).unwrap();
    folder.reload(Instant::now()).unwrap();
    fs::write(&b, wrong).unwrap();
    fs::write(&c, deny("deny-x")).unwrap();
    let (changed, told) = folder.reload(Instant::now()).unwrap();
    assert!(!changed && told.len() == 2 && keys(&folder) == all, "{told:?}");
    assert!(told.iter().any(|told| told.reason.contains("deny-x is already in")), "{told:?}");
    fs::write(&b, SERVICE).unwrap();
    assert_eq!(folder.reload(Instant::now()).unwrap(), (true, Vec::new()));
    assert_eq!(keys(&folder), [all[0], "Service default/web"]);
    // What is twice in one file is refused.
    fs::write(&b, format!("{SERVICE}{}{}", deny("new"), deny("new"))).unwrap();
    let (changed, told) = folder.reload(Instant::now()).unwrap();
    assert!(!changed && told.len() == 1 && told[0].reason.contains("/new is already in"), "{told:?}");
}

/// A route of Service `web` with so many matches, and where it is attached.
fn route(name: &str, port: &str, matches: usize) -> String {
    let matches: Vec<String> = (0..matches).map(|number| format!("{{path: {{value: /{name}/{number}}}}}")).collect();
    let rule =
        |part: &[String]| format!("  - backendRefs: [{{name: web, port: 80}}]\n    matches: [{}]\n", part.join(", "));
    let rules: String = matches.chunks(64).map(rule).collect();
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}}}\nspec:\n  parentRefs: \
         [{{kind: Service, name: web{port}}}]\n  rules:\n{rules}"
    )
}

#[test]
fn a_route_with_which_a_port_has_more_matches_than_proxies_take_is_refused_and_what_was_good_stays() {
    let (dir, mut folder) = folder();
    let write = |name: &str, text: String| fs::write(dir.path().join(name), text).unwrap();
    write("a.yaml", route("one", "", 1_000));
    write("b.yaml", route("two", ", port: 80", 998));
    write("c.yaml", route("three", ", port: 81", 998));
    assert_eq!(folder.reload(Instant::now()).unwrap(), (true, Vec::new()), "1,998 on each port");
    write("b.yaml", route("two", ", port: 80", 999));
    let (changed, told) = folder.reload(Instant::now()).unwrap();
    assert!(!changed && told.len() == 1, "{told:?}");
    assert!(
        told[0].to_string().contains(
            "b.yaml:5:38: with this HTTPRoute a port of Service default/web has 1999 matches, and proxies take 1998"
        ),
        "{}",
        told[0]
    );
    write("a.yaml", route("one", "", 999));
    assert_eq!(folder.reload(Instant::now()).unwrap(), (true, Vec::new()), "now there is room");
}

#[test]
fn a_file_that_is_written_anew_under_its_name_says_what_it_said_meanwhile() {
    let (dir, mut folder) = folder();
    let (file, other) = (dir.path().join("deny.yaml"), dir.path().join("other.yaml"));
    fs::write(&file, deny("deny-x")).unwrap();
    fs::write(&other, SERVICE).unwrap();
    let now = Instant::now();
    folder.reload(now).unwrap();
    let both = ["AuthorizationPolicy default/deny-x", "Service default/web"];
    for round in 1..=2 {
        let now = now + round * 10 * GONE;
        let away = dir.path().join("deny.yaml~");
        fs::rename(&file, &away).unwrap();
        assert_eq!(folder.reload(now).unwrap(), (false, Vec::new()));
        assert!(folder.waits() && keys(&folder) == both);
        fs::rename(&away, &file).unwrap();
        assert_eq!(folder.reload(now + GONE).unwrap(), (false, Vec::new()));
        assert!(!folder.waits() && keys(&folder) == both, "it is there again");
    }
    let now = now + 100 * GONE;
    fs::remove_file(&file).unwrap();
    assert_eq!(folder.reload(now).unwrap(), (false, Vec::new()));
    assert_eq!(folder.reload(now + GONE).unwrap(), (true, Vec::new()));
    assert_eq!((keys(&folder).len(), folder.files().len()), (1, 1));
    // Under another name it is there at once.
    let new = dir.path().join("new.yaml");
    fs::rename(&other, &new).unwrap();
    assert_eq!(folder.reload(now).unwrap(), (true, Vec::new()));
    assert_eq!((keys(&folder).len(), folder.files().len(), folder.waits()), (1, 1, false));
}
