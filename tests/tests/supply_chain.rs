//! What the workspace is built from, held against `deny.toml`.

use std::collections::BTreeSet;
use std::process::Command;

/// A package that ends up in something we build, on any platform.
struct Package {
    /// `name vVERSION`, and in brackets where it comes from when that is not crates.io.
    name: String,
    licence: String,
}

fn packages() -> Vec<Package> {
    // `cargo metadata` would also list what an optional dependency could switch on; `cargo tree` lists what is built.
    let out = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--workspace", "--target", "all", "--prefix", "none", "--no-dedupe"])
        .args(["--edges", "normal,build,dev", "--format", "{p}\t{l}"])
        .current_dir(sheetbend_tests::workspace())
        .output()
        .expect("cargo tree");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let lines: BTreeSet<&str> = std::str::from_utf8(&out.stdout).expect("UTF-8 from cargo tree").lines().collect();
    assert!(lines.len() > 50, "cargo tree lists the dependencies: {lines:?}");
    let package = |line: &&str| {
        let (name, licence) = line.split_once('\t')?;
        Some(Package { name: name.into(), licence: licence.into() })
    };
    lines.iter().filter_map(package).collect()
}

/// The quoted strings of the list `key = [...]` in `deny.toml`.
fn list(key: &str) -> Vec<String> {
    let text = std::fs::read_to_string(sheetbend_tests::workspace().join("deny.toml")).expect("deny.toml");
    let start = text.find(&format!("\n{key} = [")).unwrap_or_else(|| panic!("{key} in deny.toml"));
    let body = text[start..].split("\n]").next().expect("a list");
    body.split('"').skip(1).step_by(2).map(str::to_string).collect()
}

/// Whether an SPDX expression can be satisfied by the licences in `allowed`. `AND` binds tighter than `OR`.
fn satisfied(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let verdict = any_of(&words, &mut at, allowed);
    assert_eq!(at, words.len(), "read all of the licence `{expression}`");
    verdict
}

fn any_of(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let mut verdict = all_of(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        verdict |= all_of(words, at, allowed);
    }
    verdict
}

fn all_of(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let mut verdict = licence(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        verdict &= licence(words, at, allowed);
    }
    verdict
}

fn licence(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let word = words.get(*at).expect("a licence");
    *at += 1;
    if *word == "(" {
        let verdict = any_of(words, at, allowed);
        assert_eq!(words.get(*at), Some(&")"));
        *at += 1;
        return verdict;
    }
    let mut name = word.to_string();
    if words.get(*at) == Some(&"WITH") {
        name = format!("{name} WITH {}", words[*at + 1]);
        *at += 2;
    }
    allowed.contains(&name)
}

#[test]
fn every_dependency_has_a_licence_that_deny_toml_allows() {
    let allowed = list("allow");
    let packages = packages();
    let wrong = packages.iter().filter(|p| p.licence.is_empty() || !satisfied(&p.licence, &allowed));
    let wrong: Vec<String> = wrong.map(|p| format!("{}: {}", p.name, p.licence)).collect();
    assert!(wrong.is_empty(), "not allowed by deny.toml: {wrong:#?}");
}

#[test]
fn no_banned_crate_and_no_second_tls_provider_is_linked() {
    let banned = list("deny");
    assert!(banned.iter().any(|b| b == "ring"), "deny.toml names ring");
    let found: Vec<String> = packages().into_iter().map(|p| p.name).collect();
    let found: Vec<&String> =
        found.iter().filter(|name| banned.iter().any(|b| name.split(' ').next() == Some(b))).collect();
    assert!(found.is_empty(), "banned by deny.toml: {found:?}");
}

#[test]
fn every_dependency_comes_from_crates_io() {
    let here = format!("({}", sheetbend_tests::workspace().display());
    let strange = |p: &Package| p.name.contains('(') && !p.name.contains("(proc-macro)") && !p.name.contains(&here);
    let strange: Vec<String> = packages().into_iter().filter(strange).map(|p| p.name).collect();
    assert!(strange.is_empty(), "neither of this workspace nor from crates.io: {strange:#?}");
}

#[test]
fn a_licence_expression_is_read_as_spdx_says() {
    let allowed = ["MIT".to_string(), "ISC".to_string(), "Apache-2.0 WITH LLVM-exception".to_string()];
    for (expression, verdict) in [
        ("MIT", true),
        ("GPL-3.0", false),
        ("GPL-3.0 OR MIT", true),
        ("GPL-3.0 AND MIT", false),
        ("ISC AND (GPL-3.0 OR MIT)", true),
        ("GPL-3.0/MIT", true),
        ("Apache-2.0 WITH LLVM-exception", true),
        ("GPL-3.0 OR MIT AND GPL-2.0", false),
    ] {
        assert_eq!(satisfied(expression, &allowed), verdict, "{expression}");
    }
}
