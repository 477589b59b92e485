//! Breakers in the hands of an operator: what the admin port and `sheetbend breakers` show, and what they change.

use serde_json::Value;
use sheetbend_control_plane_client::admin_http;
use sheetbend_tests::{Load, Mesh, Mood, Moody, Process, START, Sidecar, becomes, breaker, eventually, finish, http};

async fn post(caller: &Sidecar, path: &str) -> http::Answer {
    http::send(caller.admin(), "POST", path, "").await.unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Waits for so many more good answers.
async fn answers(load: &Load, more: usize) {
    let until = load.so_far().good.len() + more;
    eventually("more answers", START, || async { (load.so_far().good.len() >= until).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_ejects_an_endpoint_for_a_while_and_restores_it_and_callers_notice_nothing() {
    let servers = Moody::some::<3>().await;
    let mesh = Mesh::with_resources(&Moody::service(&servers), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let load = Load::start(caller.proxy(), "http://web/", 2, 50.0);
    let [first, second, _] = servers.each_ref().map(|server| server.address);

    let said = post(&caller, &format!("/breakers/{first}/eject?ttl=1h")).await;
    assert_eq!(said.status, 200, "{}", said.text());
    let shown = breaker(&caller, first).await;
    assert_eq!((&shown["state"], &shown["reason"]), (&"Ejected".into(), &"operator".into()), "{shown:#}");
    assert_eq!(caller.counter("sheetbend_ejections_total", &["reason=\"operator\""]).await, 1.0);
    // What was on its way meanwhile comes first.
    answers(&load, 20).await;
    let seen = servers[0].seen();
    answers(&load, 100).await;
    assert_eq!(servers[0].seen(), seen, "nothing is sent to one that is ejected");

    // Half of them stay, for an operator too: it is said what, why, and how to mend it.
    let said = post(&caller, &format!("/breakers/{second}/eject")).await;
    assert_eq!(said.status, 409, "{}", said.text());
    for part in [format!("{second} stays in use"), "too few".into(), format!("restore another one first ({first})")] {
        assert!(said.text().contains(&part), "{}", said.text());
    }
    assert_eq!(breaker(&caller, second).await["state"], "Serving");

    let said = post(&caller, &format!("/breakers/{first}/restore?ttl=1h")).await;
    assert_eq!(said.status, 200, "{}", said.text());
    let shown = breaker(&caller, first).await;
    assert_eq!(shown["state"], "Serving", "{shown:#}");
    assert!(shown["held_until"].is_string(), "{shown:#}");
    let last = shown["history"].as_array().and_then(|history| history.last()).cloned().unwrap_or_default();
    assert_eq!(last["reason"], "operator", "{shown:#}");

    // One whose time is over comes back as any other does, by being tried.
    assert_eq!(post(&caller, &format!("/breakers/{second}/eject?ttl=1s")).await.status, 200);
    let shown = becomes(&caller, second, "Serving").await;
    let history = shown["history"].as_array().cloned().unwrap_or_default();
    assert!(history.iter().any(|turn| turn["state"] == "Probing"), "{shown:#}");
    load.stop().await.assert_none_failed(100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wish_that_cannot_be_obeyed_is_refused_with_a_reason() {
    let servers = Moody::some::<1>().await;
    let mesh = Mesh::with_resources(&Moody::service(&servers), &[]);
    let caller = mesh.caller("caller");
    let only = servers[0].address;
    let nobody = post(&caller, &format!("/breakers/{only}/eject")).await;
    assert_eq!(nobody.status, 404, "{}", nobody.text());
    assert!(nobody.text().contains("No endpoint of the mesh has been called yet"), "{}", nobody.text());
    caller.first_answer("http://web/").await;

    for (path, status, why) in [
        ("/breakers/192.0.2.1:80/eject".to_string(), 404, format!("There are {only} (web.default:80)")),
        (format!("/breakers/{only}/eject?ttl=soon"), 400, "not a duration".into()),
        (format!("/breakers/{only}/eject?ttl=25h"), 400, "24h at most".into()),
        (format!("/breakers/{only}/eject?for=1m"), 400, "write ttl=30s".into()),
        (format!("/breakers/{only}/close"), 404, "POST /breakers/ENDPOINT/eject".into()),
        (format!("/breakers/{only}/eject"), 409, "of the 1 endpoints of web.default:80 none is".into()),
    ] {
        let said = post(&caller, &path).await;
        assert_eq!(said.status, status, "{path}: {}", said.text());
        assert!(said.text().contains(&why), "{path}: {}", said.text());
    }
    let get = caller.page(&format!("/breakers/{only}/eject")).await;
    assert_eq!(get.status, 405, "{}", get.text());
    let client = as_a_browser(&caller, &format!("/breakers/{only}/eject")).await;
    assert_eq!(client, 403, "a page in a browser");
    assert_eq!(breaker(&caller, only).await["state"], "Serving");
}

/// The status for a POST as a browser sends it.
async fn as_a_browser(caller: &Sidecar, path: &str) -> u16 {
    let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\norigin: http://localhost\r\ncontent-length: 0\r\n");
    let said = sheetbend_tests::dialogue(caller.admin(), &format!("{head}connection: close\r\n\r\n"), "").await;
    let said = said.expect("an answer");
    said.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("{said}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_ejects_and_restores() {
    let servers = Moody::some::<2>().await;
    let mesh = Mesh::with_resources(&Moody::service(&servers), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let [first, second] = servers.each_ref().map(|server| server.address.to_string());
    let proxy = format!("http://{}", caller.admin());

    // Those that run here are found without being named.
    let said = mesh.finish(["breakers", "eject", &first, "--for", "10m"]).ok();
    assert!(said.contains(&format!("{first} of web.default:80 is Ejected; it is tried again at")), "{said}");
    let shown = mesh.finish(["breakers", "--proxy", &proxy]).ok();
    assert!(shown.lines().any(|line| line.contains(&first) && line.contains("operator")), "{shown}");

    // Where nobody answers, the others are shown all the same.
    const NOBODY: &str = "http://127.0.0.1:1";
    let shown = mesh.finish(["breakers", "--proxy", NOBODY, &proxy]);
    assert!(shown.status.success() && shown.stdout.contains(&first), "{}", shown.stdout);
    assert!(shown.stderr.starts_with(NOBODY), "{}", shown.stderr);
    let listed = mesh.finish(["explain", "--latest", "--proxy", NOBODY, &proxy]);
    assert!(listed.status.success() && listed.stderr.starts_with(NOBODY), "{}", listed.stderr);
    let none = finish(mesh.sheetbend(["breakers", "--proxy", NOBODY]), START);
    assert_eq!(none.status.code(), Some(1), "{}", none.stderr);

    let refused = finish(mesh.sheetbend(["breakers", "eject", &second, "--proxy", &proxy]), START);
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains("too few would be left"), "{}", refused.stderr);
    let unknown = finish(mesh.sheetbend(["breakers", "eject", "192.0.2.1:80"]), START);
    assert_eq!(unknown.status.code(), Some(1), "{}", unknown.stderr);
    assert!(unknown.stderr.contains(&first), "{}", unknown.stderr);
    let wrong = finish(mesh.sheetbend(["breakers", "eject", &first, "--for", "soon"]), START);
    assert_eq!(wrong.status.code(), Some(2), "{}", wrong.stderr);

    let said = mesh.finish(["breakers", "restore", &first, "--for", "30s"]).ok();
    assert!(said.contains("is Serving; nothing ejects it until"), "{said}");
    assert_eq!(breaker(&caller, servers[0].address).await["state"], "Serving");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_watches_hears_the_whole_and_then_of_every_change() {
    let servers = Moody::some::<3>().await;
    let mesh = Mesh::with_resources(&Moody::service(&servers), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let load = Load::start(caller.proxy(), "http://web/", 2, 50.0);
    let first = servers[0].address.to_string();
    let mut events = admin_http::watch(&caller.admin().to_string(), "/breakers").await.expect("events");
    let whole = next(&mut events).await;
    assert_eq!(whole.0, "breakers");
    assert!(whole.1["endpoints"].as_array().is_some_and(|all| all.len() == 3), "{whole:#?}");
    let mut screen = Process::spawn("watch", mesh.folder(), mesh.sheetbend(["breakers", "--watch"]));
    screen.wait_for(&first, START);

    servers[0].becomes(Mood::Fails);
    until_turned(&mut events, &first, "Ejected").await;
    screen.wait_for(&format!("web.default:80  {first}  Ejected: "), START);
    servers[0].becomes(Mood::Well);
    until_turned(&mut events, &first, "Probing").await;
    until_turned(&mut events, &first, "Serving").await;
    screen.wait_for(&format!("{first}  Serving: it has its whole share again"), START);
    assert_eq!(post(&caller, &format!("/breakers/{first}/eject?ttl=1m")).await.status, 200);
    let turn = until_turned(&mut events, &first, "Ejected").await;
    assert_eq!((&turn["from"], &turn["reason"]), (&"Serving".into(), &"operator".into()), "{turn:#}");
    assert!(turn["next_probe"].is_string(), "{turn:#}");
    screen.wait_for(&format!("{first}  Ejected: operator; until "), START);
    load.stop().await.assert_none_failed(20);

    drop(caller);
    while tokio::time::timeout(START, events.next()).await.expect("the events end with the proxy").is_some() {}
    screen.wait_for("gone; it is asked again every second", START);
}

async fn next(events: &mut admin_http::Events) -> (String, Value) {
    let event = tokio::time::timeout(START, events.next()).await.expect("an event in time").expect("an event");
    (event.name, serde_json::from_str(&event.data).expect("JSON"))
}

/// The next turn of an endpoint into a state.
async fn until_turned(events: &mut admin_http::Events, endpoint: &str, state: &str) -> Value {
    loop {
        let (name, turn) = next(events).await;
        if name == "turn" && turn["endpoint"] == endpoint && turn["state"] == state {
            return turn;
        }
    }
}
