//! Where the workspace and the binaries under test are.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

/// The root of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate is in a folder of the workspace")
}

/// The path of a binary of the workspace (`sheetbend`, `sheetbend-proxy`, `shop`, …), built from the sources as they are.
///
/// `cargo test --workspace` has built it already; a test that is run alone builds it here when it is older than a source.
pub fn binary(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let folder = BUILT.get_or_init(|| {
        let folder = profile_folder();
        let newest = ["Cargo.lock", "src", "proxy", "certs", "control-plane", "control-plane-client", "tests/src"]
            .iter()
            .filter_map(|part| newest_source(&workspace().join(part)))
            .max();
        let stale = ["sheetbend", "sheetbend-proxy", "shop", "demo"].iter().any(|b| modified(&folder.join(b)) < newest);
        if stale {
            build(&folder);
        }
        folder
    });
    let path = folder.join(name);
    assert!(path.exists(), "no binary `{name}` in {}: is it in the workspace?", folder.display());
    path
}

fn build(folder: &Path) {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--workspace", "--bins"]).current_dir(workspace());
    if folder.ends_with("release") {
        cargo.arg("--release");
    }
    cargo.env("CARGO_TARGET_DIR", folder.parent().expect("a profile's folder lies in the target folder"));
    let status = cargo.status().expect("cargo runs");
    assert!(status.success(), "the binaries under test do not build");
}

/// `target/debug`: a test's own executable is in `target/debug/deps`.
fn profile_folder() -> PathBuf {
    let me = std::env::current_exe().expect("the path of this executable");
    let folder = me.parent().expect("an executable lies in a folder");
    if folder.ends_with("deps") { folder.parent().expect("deps lies in a folder").into() } else { folder.into() }
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|m| m.modified()).ok()
}

fn newest_source(path: &Path) -> Option<SystemTime> {
    if !path.is_dir() {
        return modified(path);
    }
    let inside = std::fs::read_dir(path).ok()?;
    inside.filter_map(|entry| newest_source(&entry.ok()?.path())).max()
}
