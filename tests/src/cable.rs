//! A listener on the cable between two hosts.

use std::path::{Path, PathBuf};

use crate::mesh::START;
use crate::netns::Host;
use crate::process::Process;

/// A recording of a cable. Needs the program `tcpdump`.
#[derive(Debug)]
pub struct Cable {
    process: Process,
    file: PathBuf,
}

impl Cable {
    /// Records what passes an interface of a host, into a file of `folder`.
    pub fn record(host: &Host, interface: &str, folder: &Path) -> Self {
        let file = folder.join("cable.pcap");
        let mut command = host.command("tcpdump");
        command.args(["-i", interface, "-U", "--immediate-mode", "-Z", "root", "-s", "0", "-w"]).arg(&file);
        let mut process = Process::spawn("tcpdump", folder, command);
        process.wait_for("listening on", START);
        Self { process, file }
    }

    /// All that went over the cable.
    pub fn stop(mut self) -> Vec<u8> {
        self.process.signal(rustix::process::Signal::INT);
        self.process.wait(START);
        std::fs::read(&self.file).expect("the recording")
    }
}

/// Panics when one of `texts` is among what was heard, or when nearly nothing was.
#[track_caller]
pub fn assert_secret(heard: &[u8], texts: &[&str]) {
    assert!(heard.len() > 4096, "the cable carried something: {} bytes", heard.len());
    for text in texts {
        assert!(!shows(heard, text), "`{text}` went over the cable");
    }
}

/// Whether `text` is among what was heard.
pub fn shows(heard: &[u8], text: &str) -> bool {
    heard.windows(text.len()).any(|window| window == text.as_bytes())
}
