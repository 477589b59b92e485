//! Endpoints that fail and come back, behind a real sidecar.

use std::time::Duration;

use sheetbend_tests::{Load, Mesh, Mood, Moody, START, becomes, breaker, eventually};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_fails_is_ejected_unnoticed_and_serves_again_once_it_is_well() {
    let servers = Moody::some::<3>().await;
    let mesh = Mesh::with_resources(&Moody::service(&servers), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let load = Load::start(caller.proxy(), "http://web/", 4, 50.0);
    for server in &servers {
        becomes(&caller, server.address, "Serving").await;
    }

    servers[0].becomes(Mood::Fails);
    let ejected = becomes(&caller, servers[0].address, "Ejected").await;
    assert!(ejected["reason"].is_string() && ejected["next_probe"].is_string(), "{ejected:#}");
    for other in &servers[1..] {
        assert_eq!(breaker(&caller, other.address).await["state"], "Serving");
    }
    // It is asked now and then, and not as often as the others are.
    let before = servers.each_ref().map(|server| server.seen());
    tokio::time::sleep(Duration::from_secs(5)).await;
    let asked: Vec<u64> = servers.iter().zip(before).map(|(server, before)| server.seen() - before).collect();
    assert!(asked[0] * 10 < asked[1] + asked[2], "{asked:?}");

    servers[0].becomes(Mood::Well);
    let well = becomes(&caller, servers[0].address, "Serving").await;
    let history: Vec<_> = well["history"].as_array().expect("a history").iter().map(|turn| &turn["state"]).collect();
    assert!(history.ends_with(&[&"Probing".into(), &"Probing".into(), &"Serving".into()]), "{well:#}");
    load.stop().await.assert_none_failed(100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_circuit_breaker_answers_at_once_while_it_is_open_and_closes_once_the_service_is_well() {
    let server = Moody::some::<1>().await;
    let policy = "---\napiVersion: sheetbend.io/v1alpha1\nkind: BackendPolicy\nmetadata: {name: web}\nspec:\n  \
                  targetRefs: [{kind: Service, name: web}]\n  circuitBreaker: {failureThreshold: 3, recoveryTimeout: 2s}\n";
    let mesh = Mesh::with_resources(&format!("{}{policy}", Moody::service(&server)), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    server[0].becomes(Mood::Fails);
    let open = eventually("the circuit is open", START, || async {
        let answer = sheetbend_tests::http::get(caller.proxy(), "http://web/").await.ok()?;
        let said = answer.headers.get("proxy-status")?.to_str().ok()?;
        said.contains("the circuit breaker of web:80 is open").then_some(answer)
    });
    let open = open.await;
    assert_eq!(open.status, 503);
    assert!(open.headers.get("retry-after").is_some_and(|wait| wait == "1" || wait == "2"), "{open:?}");
    let shown = caller.page("/breakers").await.json();
    assert_eq!(shown["circuit_breakers"][0]["backend"], "web.default:80", "{shown:#}");
    assert!(caller.counter("sheetbend_circuit_opened_total", &[]).await >= 1.0);
    assert!(caller.counter("sheetbend_circuit_rejected_total", &[]).await >= 1.0);

    server[0].becomes(Mood::Well);
    caller.first_answer("http://web/").await;
    let shown = caller.page("/breakers").await.json();
    assert_eq!(shown["circuit_breakers"][0]["state"], "Closed", "{shown:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_all_endpoints_fail_none_is_ejected() {
    let servers = Moody::some::<3>().await;
    let mesh = Mesh::with_resources(&Moody::service(&servers), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let load = Load::start(caller.proxy(), "http://web/", 4, 50.0);
    for server in &servers {
        becomes(&caller, server.address, "Serving").await;
    }
    servers.iter().for_each(|server| server.becomes(Mood::Fails));
    eventually("a hundred failures", START, || async { (load.so_far().failed.len() >= 100).then_some(()) }).await;
    assert_eq!(caller.counter("sheetbend_ejections_total", &[]).await, 0.0);
    servers.iter().for_each(|server| server.becomes(Mood::Well));
    let good = load.so_far().good.len();
    eventually("a hundred answers", START, || async { (load.so_far().good.len() >= good + 100).then_some(()) }).await;
    load.stop().await;
}
