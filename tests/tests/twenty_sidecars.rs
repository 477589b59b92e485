//! Twenty sidecars at 500 requests a second in all, and a control plane that is not always there.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use sheetbend_tests::{App, Load, Mesh, START, eventually, http};

/// How long the control plane is away, twice.
const AWAY: Duration = Duration::from_secs(60);

/// How long a registration outlives the last byte of its proxy, one second more, and room for a busy machine.
const GONE: Duration = Duration::from_secs(10 + 1 + 5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_the_control_plane_is_killed_twice_and_a_dead_endpoint_goes() {
    sheetbend_tests::raise_file_limit();
    let mut mesh = Mesh::with_control_plane(&[]);
    let mut apps = Vec::new();
    let mut servers = Vec::new();
    let mut callers = Vec::new();
    for number in 0..10 {
        // Two sidecars before one program are two endpoints of its service.
        if number % 2 == 0 {
            apps.push(App::saying("tied\n").await);
        }
        servers.push(mesh.run(&format!("service-{}", number / 2)).port(apps[number / 2].port()).serve());
        callers.push(mesh.caller(&format!("caller-{number}")));
    }
    let url = |number: usize| format!("http://service-{}/", number / 2);
    let mut loads = Vec::new();
    for (number, caller) in callers.iter().enumerate() {
        eventually("a first answer", START, || async {
            http::get(caller.proxy(), &url(number)).await.ok().filter(|answer| answer.status.is_success())
        })
        .await;
        loads.push(Load::start(caller.proxy(), &url(number), 2, 25.0));
    }
    for round in 0..2 {
        tokio::time::sleep(Duration::from_secs(2)).await;
        mesh.kill_control_plane();
        tokio::time::sleep(AWAY).await;
        mesh.start_control_plane();
        if round == 0 {
            // While it is there and hears of both again, as late as 5 s after its return: one of two endpoints dies without
            // a word. (Whoever died before would count for a minute, as does everybody who has not come back yet.)
            for sidecar in [&servers[1], &callers[0]] {
                eventually("its sidecar is back", START, || async {
                    let connected = sidecar.counter("sheetbend_control_plane_connected", &[]).await;
                    (connected == 1.0).then_some(())
                })
                .await;
            }
            let died = Instant::now();
            let address = servers[1].inbound().to_string();
            servers[1].process.signal(Signal::KILL);
            eventually("the dead endpoint is gone", GONE, || async {
                let page = callers[0].page("/clusters").await.text();
                (!page.contains(&address)).then_some(())
            })
            .await;
            println!("gone after {:?}", died.elapsed());
        }
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let seen: u64 = apps.iter().map(|app| app.seen.load(Ordering::Relaxed)).sum();
    for load in loads {
        load.stop().await.assert_none_failed(500);
    }
    assert!(seen > 10_000, "{seen} requests in all");
}
