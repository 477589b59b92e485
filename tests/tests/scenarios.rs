//! Each scenario of the demo plays, and callers get what it promises.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use sheetbend_tests::{binary, finish};

/// Plays one, and once more where it had bad luck: other tests run beside it. What is broken breaks its promise again.
fn plays(scenario: &str) -> Value {
    let once = || {
        let mut command = Command::new(binary("demo"));
        command.args(["--scenario", scenario, "--for", "10s", "--rate", "100", "-o", "json"]);
        let said = finish(command, Duration::from_secs(150));
        let last = said.stdout.lines().last().unwrap_or_default();
        let result: Value =
            serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {}{}", said.stdout, said.stderr));
        assert_eq!(said.status.success(), result["kept"] == true, "the status is the verdict: {result:#}");
        (result, said.stderr)
    };
    let (result, _) = once();
    if result["kept"] == true {
        return result;
    }
    let (result, told) = once();
    assert_eq!(result["kept"], true, "{result:#}\n{told}");
    result
}

#[test]
fn callers_do_not_notice_that_one_of_five_endpoints_fails() {
    let result = plays("outage");
    assert_eq!(result["scenario"], "outage");
    assert_eq!(result["promises"].as_array().map(Vec::len), Some(3), "{result:#}");
}

#[test]
fn callers_hardly_meet_a_slow_endpoint() {
    plays("slow-endpoint");
}

#[test]
fn retries_make_no_outage_worse() {
    plays("retry-storm");
}

#[test]
fn a_new_version_takes_over_step_by_step() {
    plays("canary");
}
