//! The demo does what it promises.

use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use sheetbend_tests::{Process, START, binary, finish, until};

#[test]
fn the_demo_ends_well_with_every_edge_of_the_shop_on_its_last_line() {
    let mut command = Command::new(binary("demo"));
    command.args(["--for", "5s", "-o", "json"]);
    let said = finish(command, Duration::from_secs(120)).ok();
    let last = said.lines().last().expect("a last line");
    let graph: serde_json::Value = serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {last}"));
    let nodes: Vec<&str> = graph["nodes"].as_array().expect("nodes").iter().filter_map(|n| n["id"].as_str()).collect();
    for service in ["customers", "frontend", "cart", "catalog", "stock", "pay"] {
        assert!(nodes.contains(&format!("{service}.default").as_str()), "{service}: {nodes:?}");
    }
    let edges = graph["edges"].as_array().expect("edges");
    assert_eq!(edges.len(), 6, "{edges:#?}");
    assert!(edges.iter().all(|edge| edge["mtls"] == true), "{edges:#?}");
    let mut protocols: Vec<&str> = edges.iter().filter_map(|edge| edge["protocol"].as_str()).collect();
    protocols.sort_unstable();
    assert_eq!(protocols, ["grpc", "http", "http", "http2", "tcp", "tcp"]);
}

#[test]
fn ctrl_c_ends_the_demo_and_all_that_it_started() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut demo = Process::spawn("demo", folder.path(), Command::new(binary("demo")));
    demo.wait_for("The shop is open", START * 2);
    let started = children(demo.id());
    assert!(started.len() >= 7, "the control plane and six sidecars: {started:?}");
    demo.signal(Signal::INT);
    let status = demo.wait(Duration::from_secs(60));
    assert!(status.success(), "{status}\n{}", demo.told());
    assert!(demo.stdout().contains("export PATH="), "{}", demo.told());
    for id in started {
        until(&format!("process {id} is gone"), START, || {
            (!std::path::Path::new(&format!("/proc/{id}")).exists()).then_some(())
        });
    }
}

/// The processes that a process has started.
fn children(parent: u32) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parent_of = |id: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse::<u32>().ok()
    };
    ids.filter(|id| parent_of(*id) == Some(parent)).collect()
}
