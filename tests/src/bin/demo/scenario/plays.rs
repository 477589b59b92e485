//! The scenarios themselves: what happens, in order, and what was promised.

use std::time::Duration;

use sheetbend_tests::Tally;

use super::{Promise, Server, Settings, Stage, seen, service, success};

/// What an answer takes where nothing is wrong.
const USUAL: Duration = Duration::from_millis(20);

pub(super) async fn outage(settings: &Settings) -> (Vec<Promise>, Tally) {
    let mut servers = Vec::new();
    for _ in 0..5 {
        servers.push(Server::start("web", Duration::from_millis(5)).await);
    }
    let what = "One caller, five endpoints. One of them will fail, and come back.";
    let mut stage = Stage::set(settings, what, &service("web", &servers)).await;
    let load = stage.load();
    stage.act("all is well", stage.part(20), &load).await;
    let broken = &servers[0];
    broken.fails(true);
    stage.act(&format!("{} answers 503 to everything", broken.place()), stage.part(40), &load).await;
    let left_alone = stage.states.iter().any(|(place, state)| *place == broken.place() && state != "Serving");
    broken.fails(false);
    stage.act(&format!("{} is well again", broken.place()), stage.part(40), &load).await;
    let back = stage.becomes(&broken.place(), "Serving", &load).await;
    let tally = load.stop().await;
    let good = success(&tally);
    let promises = vec![
        Promise::new("99.9 % of the requests are answered well", format!("{good:.2} %"), good >= 99.9),
        Promise::new("the endpoint that fails is left alone", yes(left_alone), left_alone),
        Promise::new("it serves again once it is well", yes(back.is_some()), back.is_some()),
    ];
    (promises, tally)
}

pub(super) async fn slow_endpoint(settings: &Settings) -> (Vec<Promise>, Tally) {
    const SLOW: Duration = Duration::from_millis(500);
    let mut servers = Vec::new();
    for _ in 0..3 {
        servers.push(Server::start("web", USUAL).await);
    }
    let what = "One caller, three endpoints. One of them will take 500 ms for what takes the others 20 ms.";
    let mut stage = Stage::set(settings, what, &service("web", &servers)).await;
    let load = stage.load();
    stage.act("all is well", stage.part(30), &load).await;
    let before = load.so_far().good.len();
    servers[0].takes(SLOW);
    stage.act(&format!("{} is slow", servers[0].place()), stage.part(70), &load).await;
    let tally = load.stop().await;
    let during = &tally.good[before.min(tally.good.len())..];
    let noticed = during.iter().filter(|good| good.took >= SLOW / 2).count();
    let share = 100.0 * noticed as f64 / during.len().max(1) as f64;
    let good = success(&tally);
    let promises = vec![
        Promise::new("no request fails", format!("{good:.2} % answered well"), tally.failed.is_empty()),
        Promise::new(
            "at most 5 % of the requests meet the slow endpoint, of which an even share would be 33 %",
            format!("{share:.2} %"),
            share <= 5.0,
        ),
    ];
    (promises, tally)
}

pub(super) async fn retry_storm(settings: &Settings) -> (Vec<Promise>, Tally) {
    let mut servers = Vec::new();
    for _ in 0..3 {
        servers.push(Server::start("web", Duration::from_millis(5)).await);
    }
    let what = "One caller, three endpoints. All of them will fail at once, while each request may be tried again.";
    let mut stage = Stage::set(settings, what, &service("web", &servers)).await;
    let load = stage.load();
    let asked = |load: &sheetbend_tests::Load| {
        let tally = load.so_far();
        tally.good.len() + tally.failed.len()
    };
    stage.act("all is well", stage.part(25), &load).await;
    let (asked_before, seen_before) = (asked(&load), seen(&servers));
    servers.iter().for_each(|server| server.fails(true));
    let length = stage.part(40);
    stage.act("every endpoint answers 503 to everything", length, &load).await;
    let (asked_during, seen_during) = (asked(&load) - asked_before, seen(&servers) - seen_before);
    servers.iter().for_each(|server| server.fails(false));
    stage.act("every endpoint is well again", stage.part(15), &load).await;
    let failed_before = load.so_far().failed.len();
    let good_before = load.so_far().good.len();
    stage.act("and stays so", stage.part(20), &load).await;
    let tally = load.stop().await;
    // 20 % of the requests of the last ten seconds, and ten more in each of them; what is under way may be counted on one
    // side alone.
    let budget = 0.2 * (asked_before + asked_during) as f64 + 10.0 * length.as_secs_f64().max(10.0);
    let most = asked_during as f64 + budget + 40.0;
    let after = (tally.good.len() - good_before, tally.failed.len() - failed_before);
    let well = 100.0 * after.0 as f64 / (after.0 + after.1).max(1) as f64;
    let promises = vec![
        Promise::new(
            format!(
                "the endpoints get at most {most:.0} requests during the outage, {} with no budget",
                2 * asked_during
            ),
            format!("{seen_during}, of {asked_during} that the caller sent"),
            (seen_during as f64) <= most,
        ),
        Promise::new("99 % of the requests are answered well soon after it", format!("{well:.2} %"), well >= 99.0),
    ];
    (promises, tally)
}

pub(super) async fn canary(settings: &Settings) -> (Vec<Promise>, Tally) {
    let old = [Server::start("old", Duration::from_millis(5)).await];
    let new = [Server::start("new", Duration::from_millis(5)).await];
    let resources = |percent: u32| {
        let route = format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: canary}}\nspec:\n  \
             parentRefs: [{{kind: Service, group: '', name: web}}]\n  rules:\n  - backendRefs:\n    \
             - {{name: old, port: 80, weight: {}}}\n    - {{name: new, port: 80, weight: {percent}}}\n",
            100 - percent
        );
        route + &service("web", &[]) + &service("old", &old) + &service("new", &new)
    };
    let what = "One caller, two versions. The new one takes over step by step, by a route that is rewritten.";
    let mut stage = Stage::set(settings, what, &resources(0)).await;
    let load = stage.load();
    stage.act("all requests go to the old version", stage.part(10), &load).await;
    let mut promises = Vec::new();
    for percent in [10, 50, 100] {
        stage.mesh.write_resources(&resources(percent));
        stage
            .act(
                &format!("{percent} % of the requests go to the new version"),
                stage.part(2).max(Duration::from_secs(1)),
                &load,
            )
            .await;
        let (old_before, new_before) = (seen(&old), seen(&new));
        stage.act("its share is measured", stage.part(28), &load).await;
        let (old, new) = (seen(&old) - old_before, seen(&new) - new_before);
        let share = 100.0 * new as f64 / (old + new).max(1) as f64;
        // Each request is drawn by itself: four standard deviations, of as many requests as there were.
        let expected = f64::from(percent);
        let most = 4.0 * (expected * (100.0 - expected) / (old + new).max(1) as f64).sqrt();
        let what = format!("the new version gets {percent} % of the requests, to {most:.1} %");
        promises.push(Promise::new(what, format!("{share:.1} %"), (share - expected).abs() <= most));
    }
    let tally = load.stop().await;
    let good = success(&tally);
    promises.push(Promise::new("no request fails", format!("{good:.2} % answered well"), tally.failed.is_empty()));
    (promises, tally)
}

fn yes(is_so: bool) -> &'static str {
    if is_so { "yes" } else { "no" }
}
