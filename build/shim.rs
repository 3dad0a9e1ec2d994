//! The CNI shim with a static C library, for `fairway` to carry.
//!
//! Either this compiler has the standard library for musl (`rustup target add`),
//! or the library is compiled too, from the source that the BPF target needs
//! anyway, and linked by Debian's musl-tools. Where neither is there, what is
//! carried is empty and the shim beside `fairway` is installed.

use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{PASSED_ON, Result, Toolchain, cached, hash_tree, output, var};

/// What it is made from, relative to the package.
pub const INPUTS: [&str; 8] = [
    "shim/Cargo.toml",
    "shim/Cargo.lock",
    "src/bin/fairway-cni.rs",
    "src/cni/spool.rs",
    "src/cni/wire.rs",
    "src/sys/entry.rs",
    "src/sys/patience.rs",
    "build/shim.rs",
];

/// The program, from the cache or compiled into it; `None` where that cannot be.
pub fn program(root: &Path, out_dir: &Path) -> Result<Option<PathBuf>> {
    if var("CARGO_CFG_TARGET_OS")? != "linux" || var("HOST")? != var("TARGET")? {
        return Ok(None);
    }
    let target = format!("{}-unknown-linux-musl", var("CARGO_CFG_TARGET_ARCH")?);
    let Some(way) = Way::find(root, &target) else { return Ok(None) };
    let mut hasher = DefaultHasher::new();
    for input in INPUTS {
        hash_tree(&root.join(input), &mut hasher)?;
    }
    output(Command::new(&way.rustc).arg("-vV"))?.hash(&mut hasher);
    if let Some(libc) = &way.libc {
        hash_tree(libc, &mut hasher)?;
    }
    cached("shim", &format!("{:016x}", hasher.finish()), || way.compile(root, out_dir, &target)).map(Some)
}

struct Way {
    rustc: PathBuf,
    cargo: PathBuf,
    /// The C library's archive, where the standard library is to be compiled.
    libc: Option<PathBuf>,
}

impl Way {
    fn find(root: &Path, target: &str) -> Option<Self> {
        let (rustc, cargo) = (PathBuf::from(var("RUSTC").ok()?), PathBuf::from(var("CARGO").ok()?));
        let there = output(Command::new(&rustc).args(["--print", "target-libdir", "--target", target])).ok()?;
        if Path::new(there.trim_end()).is_dir() {
            return Some(Self { rustc, cargo, libc: None });
        }
        let libc = output(Command::new("musl-gcc").arg("-print-file-name=libc.a")).ok()?;
        let libc = Some(PathBuf::from(libc.trim_end())).filter(|path| path.is_absolute())?;
        let Toolchain { rustc, cargo, .. } = Toolchain::find(root).ok()?;
        Some(Self { rustc, cargo, libc: Some(libc) })
    }

    fn compile(&self, root: &Path, out_dir: &Path, target: &str) -> Result<PathBuf> {
        // One directory for all profiles of a checkout, as for ebpf/.
        let target_dir = out_dir.ancestors().nth(4).unwrap_or(out_dir).join("shim");
        // At a fixed address: nothing to relocate at each start.
        let mut flags = vec!["-Ctarget-feature=+crt-static", "-Crelocation-model=static"];
        let mut cargo = Command::new(&self.cargo);
        cargo.env_clear();
        for name in PASSED_ON {
            if let Some(value) = std::env::var_os(name) {
                cargo.env(name, value);
            }
        }
        cargo.current_dir(root.join("shim")).env("PATH", "/usr/local/bin:/usr/bin:/bin").env("RUSTC", &self.rustc);
        cargo.args(["build", "--release", "--locked", "--target", target, "--target-dir"]).arg(&target_dir);
        if self.libc.is_some() {
            flags.extend(["-Clink-self-contained=no", "-Clinker=musl-gcc"]);
            // build-std is unstable; this opens it on a release compiler.
            cargo.env("RUSTC_BOOTSTRAP", "1").arg("-Zbuild-std=std,panic_abort");
        }
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        output(&mut cargo)?;
        let program = target_dir.join(target).join("release/fairway-cni");
        fs::metadata(&program).map_err(|e| format!("no shim at {}: {e}", program.display()))?;
        Ok(program)
    }
}
