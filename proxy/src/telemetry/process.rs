//! What the process itself takes, by the names that Prometheus' own clients use.

use std::time::{SystemTime, UNIX_EPOCH};

use super::Gauge;

pub(super) fn unix_time_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// What can be read at the moment; what cannot is left out.
pub(super) fn measure() -> Vec<(Gauge, f64)> {
    let mut measured = Vec::new();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident: Option<u32> =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
    if let Some(kibibytes) = resident {
        measured.push((Gauge::ResidentMemory, 1024.0 * f64::from(kibibytes)));
    }
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        // The directory being read is one of them.
        measured.push((Gauge::OpenFiles, files.count().saturating_sub(1) as f64));
    }
    if let Some(max) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
        measured.push((Gauge::MaxFiles, max as f64));
    }
    measured
}
