//! Every resource that the pages about policies show is good as it stands.

use std::path::{Path, PathBuf};

use sheetbend_tests::{Mesh, workspace};

/// The pages, without the one that lists them.
fn pages() -> Vec<PathBuf> {
    let folder = std::fs::read_dir(workspace().join("docs/policies")).expect("docs/policies");
    let files = folder.map(|entry| entry.expect("an entry").path());
    files.filter(|file| file.extension().is_some_and(|e| e == "md") && !file.ends_with("README.md")).collect()
}

fn read(file: &Path) -> String {
    std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// The blocks of one language, each below as many empty lines as stand before it in the page: a mistake is told by its line
/// in the page itself.
fn blocks(page: &str, language: &str) -> Vec<String> {
    let mut blocks: Vec<String> = Vec::new();
    let mut inside = false;
    for (number, line) in page.lines().enumerate() {
        match (inside, line.trim_end()) {
            (true, "```") => inside = false,
            (true, line) => blocks.last_mut().expect("a block").push_str(&format!("{line}\n")),
            (false, line) if line.strip_prefix("```") == Some(language) => {
                inside = true;
                blocks.push("\n".repeat(number + 1));
            }
            (false, _) => {}
        }
    }
    blocks
}

#[test]
fn every_resource_of_every_page_is_good_as_it_stands() {
    let mesh = Mesh::local();
    for page in pages() {
        let text = read(&page);
        let resources = blocks(&text, "yaml");
        assert!(!resources.is_empty(), "{} shows no resource in a yaml block", page.display());
        let folder = mesh.folder().join(page.file_stem().expect("a name"));
        std::fs::create_dir_all(&folder).expect("a folder for the blocks");
        for (number, resource) in resources.iter().enumerate() {
            std::fs::write(folder.join(format!("block-{number}.yaml")), resource).expect("the block is written");
        }
        let folder = folder.to_str().expect("a path of UTF-8");
        let checked = mesh.finish(["check", folder]);
        assert!(checked.status.success(), "{} (lines are the page's):\n{}", page.display(), checked.stdout);
    }
}

#[test]
fn every_page_says_what_is_measured_and_how_to_see_it() {
    for page in pages() {
        let text = read(&page);
        for section in ["## Metrics", "## See it"] {
            assert!(text.lines().any(|line| line.trim_end() == section), "{} has no `{section}`", page.display());
        }
    }
}

#[test]
fn every_page_is_listed() {
    let index = read(&workspace().join("docs/policies/README.md"));
    for page in pages() {
        let name = page.file_name().and_then(|name| name.to_str()).expect("a name of UTF-8");
        assert!(index.contains(&format!("({name})")), "docs/policies/README.md does not lead to {name}");
    }
}
