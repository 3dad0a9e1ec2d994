//! Compiles `ebpf/` for the BPF target and the CNI shim with a static C library
//! (`build/shim.rs`), and leaves both in `OUT_DIR`; has the shim that is a plain
//! binary of this package linked with one library less.
//!
//! Both are cached outside `target/` by everything it is made from (the
//! sources, the lock file, the compiler, the linker), so a clean build or a
//! second checkout does not compile it again, and a change on the user side never
//! does. Which compiler to use is `scripts/ebpf-toolchain.sh`'s decision; a
//! decision record is in `docs/decisions/0003-ebpf-toolchain.md`.

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[path = "build/shim.rs"]
mod shim;

/// What the object is made from, relative to the package.
const INPUTS: [&str; 5] = ["ebpf/src", "ebpf/abi/src", "ebpf/abi/Cargo.toml", "ebpf/Cargo.toml", "ebpf/Cargo.lock"];
/// What a nested cargo may see of our environment. Everything else, and above
/// all cargo's own variables, would make it compile for the wrong tool chain.
const PASSED_ON: [&str; 10] = [
    "HOME",
    "CARGO_HOME",
    "TMPDIR",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
];
const TARGET: &str = "bpfel-unknown-none";

fn main() {
    if let Err(e) = run() {
        for line in e.to_string().lines() {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    let root = PathBuf::from(var("CARGO_MANIFEST_DIR")?);
    let out_dir = PathBuf::from(var("OUT_DIR")?);
    for input in INPUTS.iter().chain(&shim::INPUTS).chain(&["build.rs", "scripts/ebpf-toolchain.sh"]) {
        println!("cargo::rerun-if-changed={input}");
    }
    for name in ["FAIRWAY_EBPF_OBJECT", "FAIRWAY_EBPF_TOOLCHAIN", "FAIRWAY_BPF_LINKER", "FAIRWAY_CACHE"] {
        println!("cargo::rerun-if-env-changed={name}");
    }

    link_shim_without_unwinder(&out_dir)?;
    let object = match std::env::var_os("FAIRWAY_EBPF_OBJECT") {
        Some(path) => {
            println!("cargo::rerun-if-changed={}", Path::new(&path).display());
            PathBuf::from(path)
        }
        None => cached_object(&root, &out_dir)?,
    };
    let embedded = out_dir.join("fairway-ebpf.o");
    fs::copy(&object, &embedded).map_err(|e| format!("cannot read the eBPF object {}: {e}", object.display()))?;

    let carried = out_dir.join("fairway-cni");
    let program = shim::program(&root, &out_dir)?;
    match &program {
        Some(program) => fs::copy(program, &carried).map(drop),
        None => fs::write(&carried, []),
    }
    .map_err(|e| format!("{}: {e}", carried.display()))?;
    // For tests: what ships is what is tested.
    let tested = program.map(|_| carried).unwrap_or_default();
    println!("cargo::rustc-env=FAIRWAY_SHIM={}", tested.display());
    Ok(())
}

/// The CNI shim is started for every call, and finding and relocating a library
/// takes as long as half of what it does then. This one, which is installed where
/// no static one could be built, needs the C library; the unwinder comes as an
/// archive as well. Where that is missing the shim has both and works the same.
///
/// rustc asks every program's linker for the library; but a linker takes from
/// the first folder that has either, so this program is given one with the
/// archive alone.
fn link_shim_without_unwinder(out_dir: &Path) -> Result<()> {
    let target = ["CARGO_CFG_TARGET_OS", "CARGO_CFG_TARGET_ENV"].map(|name| var(name).unwrap_or_default());
    let native = var("HOST")? == var("TARGET")?;
    let found = output(Command::new("cc").arg("-print-file-name=libgcc_eh.a")).unwrap_or_default();
    let archive = Path::new(found.trim_end());
    if target != ["linux", "gnu"] || !native || !archive.is_absolute() {
        return Ok(());
    }
    let folder = out_dir.join("unwinder");
    fs::create_dir_all(&folder)?;
    let link = folder.join("libgcc_s.a");
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(archive, link)?;
    println!("cargo::rustc-link-arg-bin=fairway-cni=-static-libgcc");
    println!("cargo::rustc-link-arg-bin=fairway-cni=-L{}", folder.display());
    Ok(())
}

/// The object for these inputs: from the cache, or compiled into it.
fn cached_object(root: &Path, out_dir: &Path) -> Result<PathBuf> {
    let toolchain = Toolchain::find(root)?;
    let mut hasher = DefaultHasher::new();
    for input in INPUTS {
        hash_tree(&root.join(input), &mut hasher)?;
    }
    fs::read(root.join("build.rs"))?.hash(&mut hasher);
    toolchain.version.hash(&mut hasher);
    toolchain.linker_version.hash(&mut hasher);
    cached("ebpf", &format!("{:016x}.o", hasher.finish()), || toolchain.compile(root, out_dir))
}

/// The file of this name in a folder of the cache; built and put there if it is not.
fn cached(folder: &str, name: &str, build: impl FnOnce() -> Result<PathBuf>) -> Result<PathBuf> {
    let folder = cache_dir()?.join(folder);
    let cached = folder.join(name);
    if cached.is_file() {
        return Ok(cached);
    }
    let built = build()?;
    // Renamed into place: another build may be doing the same.
    fs::create_dir_all(&folder)?;
    let partial = folder.join(format!(".{name}.{}", std::process::id()));
    fs::copy(&built, &partial)?;
    fs::rename(&partial, &cached)?;
    Ok(cached)
}

struct Toolchain {
    rustc: PathBuf,
    cargo: PathBuf,
    linker: PathBuf,
    linker_version: String,
    version: String,
}

impl Toolchain {
    fn find(root: &Path) -> Result<Self> {
        let found = output(Command::new("sh").arg(root.join("scripts/ebpf-toolchain.sh")))?;
        let facts: HashMap<&str, &str> = found.lines().filter_map(|l| l.split_once('=')).collect();
        let fact = |key: &str| facts.get(key).copied().ok_or(format!("scripts/ebpf-toolchain.sh names no {key}"));
        if fact("linker_ready")? != "yes" {
            return Err(format!(
                "bpf-linker {} for LLVM {} is not built yet (looked at {}).\nRun `scripts/setup.sh` as root, or set FAIRWAY_EBPF_OBJECT to a compiled object.",
                fact("linker_version")?,
                fact("llvm")?,
                fact("linker")?
            )
            .into());
        }
        let rustc = PathBuf::from(fact("rustc")?);
        let linker = PathBuf::from(fact("linker")?);
        Ok(Self {
            version: output(Command::new(&rustc).arg("-vV"))?,
            linker_version: output(Command::new(&linker).arg("--version"))?,
            cargo: PathBuf::from(fact("cargo")?),
            rustc,
            linker,
        })
    }

    fn compile(&self, root: &Path, out_dir: &Path) -> Result<PathBuf> {
        // One directory for all profiles of a checkout: the core library is then
        // compiled once. OUT_DIR is <target>/<profile>/build/<package>/out.
        let target_dir = out_dir.ancestors().nth(4).unwrap_or(out_dir).join("ebpf");
        let flags = [
            format!("-Clinker={}", self.linker.display()),
            // 32-bit registers and jumps: every kernel from 5.1 on.
            "-Ctarget-cpu=v3".into(),
            // BTF is made from the debug information.
            "-Cdebuginfo=2".into(),
            "-Clink-arg=--btf".into(),
            // LLVM cannot do that with structures it has aligned to 16 bytes, and crashes.
            "-Clink-arg=--disable-expand-memcpy-in-order".into(),
        ];
        let mut cargo = Command::new(&self.cargo);
        cargo.env_clear();
        for name in PASSED_ON {
            if let Some(value) = std::env::var_os(name) {
                cargo.env(name, value);
            }
        }
        cargo
            .current_dir(root.join("ebpf"))
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("RUSTC", &self.rustc)
            // build-std is unstable; this opens it on a release compiler.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .args(["build", "--release", "--locked", "-Zbuild-std=core", "--target", TARGET, "--target-dir"])
            .arg(&target_dir);
        output(&mut cargo)?;
        Ok(target_dir.join(TARGET).join("release/fairway"))
    }
}

/// Runs a command to its end; its standard error becomes the error's text.
fn output(command: &mut Command) -> Result<String> {
    let done = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("cannot run {}: {e}", command.get_program().display()))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        return Err(format!("{} failed ({}):\n{said}", command.get_program().display(), done.status).into());
    }
    Ok(String::from_utf8(done.stdout)?)
}

fn hash_tree(path: &Path, hasher: &mut DefaultHasher) -> Result<()> {
    let wrap = |e| format!("cannot read {}: {e}", path.display());
    if path.is_dir() {
        let mut entries = fs::read_dir(path).map_err(wrap)?.collect::<std::io::Result<Vec<_>>>()?;
        entries.sort_by_key(|e| e.file_name());
        for entry in entries {
            entry.file_name().hash(hasher);
            hash_tree(&entry.path(), hasher)?;
        }
    } else {
        fs::read(path).map_err(wrap)?.hash(hasher);
    }
    Ok(())
}

/// As in `scripts/ebpf-toolchain.sh`.
fn cache_dir() -> Result<PathBuf> {
    let dir = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    Ok(dir("FAIRWAY_CACHE")
        .or_else(|| dir("XDG_CACHE_HOME").map(|d| d.join("fairway")))
        .unwrap_or_else(|| dir("HOME").unwrap_or_else(|| "/root".into()).join(".cache/fairway")))
}

fn var(name: &str) -> Result<String> {
    std::env::var(name).map_err(|e| format!("{name}: {e}").into())
}
