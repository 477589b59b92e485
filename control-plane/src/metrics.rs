//! What the control plane counts, in Prometheus' text format. Measured when somebody asks; nothing is paid otherwise.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::state::{Shared, lock};

/// A family of samples, each with its labels as they are written (`{state="live"}`, or nothing).
struct Gauge {
    name: &'static str,
    help: &'static str,
    samples: BTreeMap<String, f64>,
}

/// Everything at once.
pub(crate) fn render(shared: &Shared, started: Instant) -> String {
    let families = [
        gauge("sheetbend_registrations", "Registered proxies, by whether they are heard.", registrations(shared)),
        gauge("sheetbend_discovery_streams", "Open discovery streams, by dialect.", streams(shared)),
        gauge("sheetbend_resource_files", "Files of the resource folder, by whether they are in force.", files(shared)),
        gauge("sheetbend_root_expiry_timestamp_seconds", "When each root expires, in Unix time.", roots(shared)),
        gauge("sheetbend_world", "Changes of the mesh since the start.", alone(shared.worlds().borrow().number as f64)),
        gauge(
            "process_start_time_seconds",
            "When this process started, in Unix time.",
            alone(unix(SystemTime::now()) - started.elapsed().as_secs_f64()),
        ),
        gauge("process_resident_memory_bytes", "Resident memory.", resident().map(alone).unwrap_or_default()),
    ];
    let mut text = String::new();
    for Gauge { name, help, samples } in families.iter().filter(|family| !family.samples.is_empty()) {
        // Writing to a String never fails.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
        for (labels, value) in samples {
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    }
    text
}

fn gauge(name: &'static str, help: &'static str, samples: BTreeMap<String, f64>) -> Gauge {
    Gauge { name, help, samples }
}

fn alone(value: f64) -> BTreeMap<String, f64> {
    BTreeMap::from([(String::new(), value)])
}

/// How many there are of each. `all` are there even when there is none.
fn count<'a>(label: &str, all: &[&str], found: impl Iterator<Item = &'a str>) -> BTreeMap<String, f64> {
    let labels = |value: &str| format!("{{{label}=\"{value}\"}}");
    let mut samples: BTreeMap<String, f64> = all.iter().map(|value| (labels(value), 0.0)).collect();
    found.for_each(|value| *samples.entry(labels(value)).or_default() += 1.0);
    samples
}

fn registrations(shared: &Shared) -> BTreeMap<String, f64> {
    let states: Vec<&str> = shared.registrations().values().map(|(_, state, _)| *state).collect();
    count("state", &["live", "silent", "from before the restart"], states.into_iter())
}

fn streams(shared: &Shared) -> BTreeMap<String, f64> {
    // A stream that has not said who it is yet has no dialect.
    let dialects = shared.streams().into_iter().map(|stream| stream.dialect).filter(|dialect| !dialect.is_empty());
    let dialects: Vec<&str> = dialects.collect();
    count("dialect", &["sheetbend", "grpc", "envoy"], dialects.into_iter())
}

fn files(shared: &Shared) -> BTreeMap<String, f64> {
    let folder = lock(&shared.folder);
    let Some(folder) = folder.as_ref() else { return BTreeMap::new() };
    let states: Vec<&str> =
        folder.files().values().map(|file| if !file.problems().is_empty() { "refused" } else { "read" }).collect();
    count("state", &["read", "refused"], states.into_iter())
}

fn roots(shared: &Shared) -> BTreeMap<String, f64> {
    let trust = shared.worlds().borrow().trust.clone();
    let root = |root: &sheetbend_certs::Root| (format!("{{sha256=\"{}\"}}", root.sha256()), unix(root.not_after()));
    trust.bundle.roots().iter().map(root).collect()
}

fn unix(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn resident() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(1024.0 * line.trim().strip_suffix(" kB")?.parse::<f64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_that_nobody_is_in_is_shown_with_zero() {
        let samples = count("state", &["live", "silent"], ["live", "live", "new"].into_iter());
        let shown: Vec<_> = samples.iter().map(|(labels, value)| (labels.as_str(), *value)).collect();
        assert_eq!(shown, [("{state=\"live\"}", 2.0), ("{state=\"new\"}", 1.0), ("{state=\"silent\"}", 0.0)]);
    }
}
