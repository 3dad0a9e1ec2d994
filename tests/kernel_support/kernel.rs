//! Kernels that `scripts/setup.sh test` has fetched and unpacked, and the modules
//! they are made of.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

pub struct Kernel {
    pub release: String,
    pub image: PathBuf,
    modules: BTreeMap<String, PathBuf>,
}

impl Kernel {
    /// The newest fetched kernel of a series such as `6.1`.
    pub fn of_series(series: &str) -> Option<Self> {
        let prefix = format!("{series}.");
        let found = fs::read_dir(cache()?.join("kernels")).ok()?.filter_map(Result::ok);
        let newest = found.filter(|e| e.file_name().to_string_lossy().starts_with(&prefix)).max_by_key(|e| {
            let numbers =
                e.file_name().to_string_lossy().split(['.', '-']).map_while(|n| n.parse::<u32>().ok()).collect();
            <Vec<u32>>::clone(&numbers)
        })?;
        let release = newest.file_name().to_string_lossy().into_owned();
        let image = newest.path().join("boot").join(format!("vmlinuz-{release}"));
        let mut modules = BTreeMap::new();
        collect(&newest.path().join("lib/modules"), &mut modules);
        image.is_file().then_some(Self { release, image, modules })
    }

    /// The modules with all that they need, in the order in which they load.
    /// What is not there is built in, or missing: then loading says so.
    pub fn with_dependencies(&self, wanted: &[&str]) -> Vec<(String, Vec<u8>)> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in wanted {
            self.load_after(name, &mut seen, &mut order);
        }
        order
    }

    fn load_after(&self, name: &str, seen: &mut BTreeSet<String>, order: &mut Vec<(String, Vec<u8>)>) {
        let Some(path) = self.modules.get(name) else { return };
        if !seen.insert(name.to_owned()) {
            return;
        }
        let content = fs::read(path).unwrap();
        for needed in depends(&content) {
            self.load_after(&needed, seen, order);
        }
        order.push((name.to_owned(), content));
    }
}

fn cache() -> Option<PathBuf> {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("FAIRWAY_CACHE").or_else(|| {
        let base = var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|home| home.join(".cache")))?;
        Some(base.join("fairway"))
    })
}

fn collect(dir: &Path, modules: &mut BTreeMap<String, PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
        let path = entry.path();
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            collect(&path, modules);
        } else if path.extension().is_some_and(|e| e == "ko") {
            // The kernel's names have no dashes.
            let name = path.file_stem().unwrap_or_default().to_string_lossy().replace('-', "_");
            modules.insert(name, path);
        }
    }
}

/// The line `depends=a,b` of a module's information section.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|w| w == KEY) else { return Vec::new() };
    let rest = &module[at + KEY.len()..];
    let end = rest.iter().position(|b| *b == 0).unwrap_or(rest.len());
    let names = String::from_utf8_lossy(&rest[..end]).into_owned();
    names.split(',').filter(|n| !n.is_empty()).map(|n| n.replace('-', "_")).collect()
}
