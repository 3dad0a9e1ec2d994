//! Promise: the repository keeps the shape its plan says: headers, owners of
//! actix and of unsafe code, pure cores, no `mod.rs`, nothing of one machine.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Paths of what git tracks or would track, relative to the root.
fn files() -> Vec<PathBuf> {
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"])
        .current_dir(root())
        .output()
        .unwrap();
    if listed.status.success() {
        let names = String::from_utf8(listed.stdout).unwrap();
        let paths = names.split('\0').filter(|n| !n.is_empty()).map(PathBuf::from);
        return paths.filter(|p| root().join(p).is_file()).collect();
    }
    // An unpacked archive, or a checkout that git mistrusts.
    let mut found = Vec::new();
    for dir in ["src", "ebpf", "tests", "scripts", "deploy", "docs", "benches"] {
        walk(&root().join(dir), &mut found);
    }
    found.into_iter().map(|p| p.strip_prefix(root()).unwrap().to_owned()).collect()
}

fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(&path, found);
        } else {
            found.push(path);
        }
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(root().join(path)).unwrap()).into_owned()
}

fn is_rust(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "rs")
}

/// Rust sources below one of these folders, with their text.
fn rust_below(folders: &[&str]) -> Vec<(PathBuf, String)> {
    let below = |p: &PathBuf| is_rust(p) && folders.iter().any(|f| p.starts_with(f));
    let found: Vec<_> = files().into_iter().filter(below).map(|p| (p.clone(), read(&p))).collect();
    assert!(!found.is_empty(), "no sources below {folders:?}");
    found
}

/// Line numbers and text of code, without comments and blank lines.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let numbered = text.lines().enumerate().map(|(i, l)| (i + 1, l.trim()));
    numbered.filter(|(_, l)| !l.is_empty() && !l.starts_with("//"))
}

/// Whether `word` stands in `line` by itself.
fn has_word(line: &str, word: &str) -> bool {
    let edge = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != '-');
    line.match_indices(word).any(|(at, _)| {
        edge(line.get(..at).and_then(|s| s.chars().last()))
            && edge(line.get(at + word.len()..).and_then(|s| s.chars().next()))
    })
}

#[track_caller]
fn none(complaints: Vec<String>) {
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn every_source_file_opens_with_a_header() {
    // A module's tests in a file of their own are described by their module.
    let without = |(path, text): (PathBuf, String)| {
        (!path.ends_with("tests.rs") && !text.starts_with("//!")).then(|| format!("{}: no //! header", path.display()))
    };
    none(rust_below(&["src", "ebpf", "tests", "benches"]).into_iter().filter_map(without).collect());
}

#[test]
fn only_the_actor_layer_imports_actix() {
    let mut complaints = Vec::new();
    for (path, text) in rust_below(&["src"]) {
        if path.starts_with("src/actor") || path == Path::new("src/actor.rs") {
            continue;
        }
        for (line, text) in code(&text) {
            if has_word(text, "actix") || has_word(text, "actix_rt") {
                complaints.push(format!("{}:{line}: {text}", path.display()));
            }
        }
    }
    none(complaints);
}

#[test]
fn unsafe_code_is_in_sys_alone() {
    let mut complaints = Vec::new();
    for (path, text) in rust_below(&["src"]) {
        if path.starts_with("src/sys") {
            continue;
        }
        for (line, text) in code(&text) {
            if has_word(text, "unsafe") && !text.contains("unsafe_code") {
                complaints.push(format!("{}:{line}: {text}", path.display()));
            }
        }
    }
    none(complaints);
}

#[test]
fn modules_are_named_by_their_file() {
    let named_mod = |(path, _): (PathBuf, String)| {
        path.file_name().is_some_and(|n| n == "mod.rs").then(|| format!("{}: name it after its module", path.display()))
    };
    none(rust_below(&["src", "ebpf"]).into_iter().filter_map(named_mod).collect());
}

/// What is decided is decided by plain functions: the files named here do no
/// input or output, and get time and randomness as arguments.
#[test]
fn pure_cores_import_no_runtime() {
    let mut complaints = Vec::new();
    for (path, text) in rust_below(&["src"]) {
        let name = path.file_stem().and_then(|n| n.to_str()).unwrap_or_default();
        if !matches!(name, "plan" | "compile" | "decide" | "diff") {
            continue;
        }
        for (line, text) in code(&text) {
            let runtime = ["actix", "tokio", "kube", "nix"].into_iter().find(|word| has_word(text, word));
            let impure = ["SystemTime::now", "Instant::now", "rand::rng"].into_iter().find(|call| text.contains(call));
            if let Some(what) = runtime.or(impure) {
                complaints.push(format!("{}:{line}: a pure core uses {what}: {text}", path.display()));
            }
        }
    }
    none(complaints);
}

#[test]
fn the_shim_uses_the_standard_library_and_serde_alone() {
    let mut complaints = Vec::new();
    let shim = read(Path::new("src/bin/fairway-cni.rs"));
    let own: Vec<_> = code(&shim).filter_map(|(_, l)| l.strip_prefix("mod ")?.strip_suffix(';')).collect();
    for (line, text) in code(&shim) {
        let used = text.strip_prefix("use ").and_then(|u| u.split([':', ';', ' ']).next());
        let allowed = |u| own.contains(&u) || matches!(u, "std" | "serde" | "serde_json" | "self" | "super" | "crate");
        if used.is_some_and(|u| !allowed(u)) {
            complaints.push(format!("src/bin/fairway-cni.rs:{line}: {text}"));
        }
    }
    none(complaints);
}

#[test]
fn nothing_names_a_place_of_one_machine() {
    // Spelled so that this file does not match itself.
    let places =
        [["/wo", "rk/"], ["/ho", "me/"], ["/Us", "ers/"], ["/tm", "p/bg"], ["share", "d/facts"], ["share", "d/design"]];
    let mut complaints = Vec::new();
    for path in files() {
        let name = path.to_string_lossy();
        if name.ends_with(".lock") || name.contains("LICENSE") {
            continue;
        }
        for (number, line) in read(&path).lines().enumerate() {
            for place in &places {
                if line.contains(&place.concat()) {
                    complaints.push(format!("{name}:{}: {line}", number + 1));
                }
            }
        }
    }
    none(complaints);
}

#[test]
fn scripts_are_executable_and_parse() {
    use std::os::unix::fs::PermissionsExt as _;
    let scripts: Vec<_> =
        files().into_iter().filter(|p| p.starts_with("scripts") || p == Path::new(".ci/run")).collect();
    assert!(scripts.iter().any(|p| p.ends_with("setup.sh")));
    for script in scripts {
        let path = root().join(&script);
        assert!(fs::metadata(&path).unwrap().permissions().mode() & 0o111 != 0, "{script:?} is not executable");
        let parsed = Command::new("sh").arg("-n").arg(&path).output().unwrap();
        assert!(parsed.status.success(), "{script:?}: {}", String::from_utf8_lossy(&parsed.stderr));
    }
}

#[test]
fn every_licence_that_a_manifest_names_has_its_text() {
    for (file, opening) in [
        ("LICENSE", "Apache License"),
        ("ebpf/LICENSE-MIT", "MIT License"),
        ("ebpf/LICENSE-GPL-2.0", "GNU GENERAL PUBLIC LICENSE"),
    ] {
        assert!(read(Path::new(file)).contains(opening), "{file}");
    }
    assert!(read(Path::new("Cargo.toml")).contains("license = \"Apache-2.0\""));
    for manifest in ["ebpf/Cargo.toml", "ebpf/abi/Cargo.toml"] {
        assert!(read(Path::new(manifest)).contains("license = \"MIT OR GPL-2.0-only\""), "{manifest}");
    }
}
