#!/bin/sh
# Installs what is missing for one purpose and checks the kernel; does nothing,
# in a moment, when nothing is missing.
#
#   scripts/setup.sh build|demo|test|lint|bench
#
# Debian 12 with rustup's stable Rust and root. Packages that bring a service are
# installed without starting it. Elsewhere: have a Rust tool chain with the core
# library's source (`rustup toolchain install nightly --component rust-src`) and
# LLVM's development files of its version, and this builds the linker for it.
set -eu

purpose=${1:-build}
root=$(cd "$(dirname "$0")/.." && pwd)
NEXTEST_VERSION=0.9.151
DENY_VERSION=0.20.2
PATH=${CARGO_HOME:-${HOME:-/root}/.cargo}/bin:$PATH:/usr/sbin:/sbin
export PATH

say() { printf '%s\n' "setup: $*" >&2; }
die() { printf '%s\n' "$*" >&2; exit 1; }

is_root() { [ "$(id -u)" = 0 ]; }
has() { command -v "$1" >/dev/null 2>&1; }
installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# One set-up installs at a time: a demo may start beside a test run.
locked=
lock() {
    [ -z "$locked" ] || return 0
    cache=${FAIRWAY_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/fairway}
    mkdir -p "$cache"
    exec 9>"$cache/setup.lock"
    flock 9
    locked=yes
}

# --- What needs root, said before anything is done ---------------------------
case $purpose in
demo | test | bench)
    is_root || die "Run this as root (sudo make $purpose): it makes network namespaces and loads eBPF programs."
    ;;
build | lint) ;;
*) die "usage: scripts/setup.sh build|demo|test|lint|bench" ;;
esac
has cargo || die "There is no Rust here; install it with rustup from https://rustup.rs and run this again."

# --- Debian packages ----------------------------------------------------------
# policy-rc.d is how Debian asks whether a package may start its service. Ours
# says no; what was there before comes back, after an interruption too.
POLICY=/usr/sbin/policy-rc.d
MARK='# put here by Fairway setup for one installation'
restore_policy() {
    if grep -qsF "$MARK" "$POLICY"; then
        rm -f "$POLICY"
    fi
    if [ -e "$POLICY.before-fairway" ]; then
        mv -f "$POLICY.before-fairway" "$POLICY"
    fi
}
forbid_services() {
    restore_policy
    [ ! -e "$POLICY" ] || mv "$POLICY" "$POLICY.before-fairway"
    printf '#!/bin/sh\n%s\nexit 101\n' "$MARK" >"$POLICY"
    chmod 755 "$POLICY"
}

updated=
apt_update() {
    [ -n "$updated" ] || apt-get update -qq -o DPkg::Lock::Timeout=300 >&2 || die "apt-get update failed; check the machine's package sources and network."
    updated=yes
}
offered() { [ -n "$(apt-cache policy "$1" 2>/dev/null | sed -n 's/^  Candidate: \(.*\)$/\1/p' | grep -v '(none)')" ]; }

# Installs those of the packages that are missing.
need() {
    missing=
    for package in "$@"; do
        installed "$package" || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    has apt-get || die "Install what provides these Debian packages, then run this again:$missing"
    is_root || die "Run scripts/setup.sh $purpose as root: it has to install$missing"
    lock
    say "installing$missing"
    apt_update
    trap restore_policy EXIT
    trap 'exit 130' INT TERM HUP
    forbid_services
    # shellcheck disable=SC2086 # a list of words
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o DPkg::Lock::Timeout=300 \
        --no-install-recommends $missing >&2 </dev/null ||
        die "apt-get could not install$missing; its message is above."
    restore_policy
    trap - EXIT INT TERM HUP
}

# As need, for a program whose package some releases lack: tests that want it
# are skipped, and counted, without it.
want() { # PROGRAM PACKAGE...
    program=$1
    shift
    ! has "$program" || return 0
    has apt-get && is_root || return 0
    apt_update
    for package in "$@"; do
        if offered "$package"; then
            need "$package"
            return 0
        fi
    done
    say "no package here provides $program; what needs it is skipped"
}

on_debian() { has dpkg-query && has apt-get; }

# A kernel for tests to boot in an emulator, unpacked in the cache and not
# installed: cache/kernels/RELEASE/{boot,lib}. Tests that want it are skipped,
# and counted, without it.
want_kernel() { # SERIES METAPACKAGE
    kernels=${FAIRWAY_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/fairway}/kernels
    for there in "$kernels/$1".*; do
        [ ! -d "$there" ] || return 0
    done
    [ "$(dpkg --print-architecture)" = amd64 ] || return 0
    lock
    apt_update
    package=$(apt-cache depends "$2" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
    release=${package#linux-image-}
    case $release in
    "$1".*) ;;
    *)
        say "no package here is a kernel $1; tests on it are skipped"
        return 0
        ;;
    esac
    say "fetching the kernel $release for tests in an emulator"
    partial=$kernels/.partial.$$
    rm -rf "$kernels"/.partial.*
    mkdir -p "$partial/unpacked"
    if (cd "$partial" && apt-get download -qq -o APT::Sandbox::User=root "$package" >&2) &&
        dpkg -x "$partial"/*.deb "$partial/unpacked"; then
        mv "$partial/unpacked" "$kernels/$release"
    else
        say "the kernel $release could not be fetched; tests on it are skipped"
    fi
    rm -rf "$partial"
}

if on_debian; then
    case $purpose in
    build | lint) need gcc g++ libc6-dev musl-tools ;;
    demo) need gcc g++ libc6-dev musl-tools iproute2 nftables ;;
    test | bench)
        need gcc g++ libc6-dev musl-tools iproute2 nftables iptables containernetworking-plugins python3 python3-venv python3-pip
        ;;
    esac
    if [ "$purpose" = test ]; then
        want kubectl kubectl kubernetes-client
        want chromium chromium
        want busybox busybox-static busybox
        want qemu-system-x86_64 qemu-system-x86
        want_kernel 6.1 linux-image-cloud-amd64
    fi
fi

# --- The kernel ---------------------------------------------------------------
if [ "$purpose" != build ] && [ "$purpose" != lint ]; then
    unshare --net --mount true 2>/dev/null ||
        die "The kernel does not let root make network and mount namespaces; run this on a machine or a virtual machine of your own, not in an unprivileged container."
    unshare --net ip link add fwl-probe0 type veth peer name fwl-probe1 2>/dev/null ||
        die "The kernel has no veth devices (CONFIG_VETH); boot one that has them, such as Debian's linux-image-cloud-amd64."
    grep -qw bpf /proc/filesystems ||
        die "The kernel has no BPF file system (CONFIG_BPF_SYSCALL); boot one that has it, such as Debian's linux-image-cloud-amd64."
    grep -qw cgroup2 /proc/filesystems ||
        die "The kernel has no cgroup v2 (CONFIG_CGROUPS); boot one that has it, such as Debian's linux-image-cloud-amd64."
fi

# --- The tool chain for eBPF --------------------------------------------------
if [ -z "${FAIRWAY_EBPF_OBJECT:-}" ]; then
    if ! found=$("$root/scripts/ebpf-toolchain.sh" 2>/dev/null); then
        on_debian || exec "$root/scripts/ebpf-toolchain.sh"
        need rustc-web cargo-web rust-web-src
        found=$("$root/scripts/ebpf-toolchain.sh")
    fi
    fact() { printf '%s\n' "$found" | sed -n "s/^$1=//p"; }
    # Debian may not have LLVM of the version that a rustup tool chain uses; its
    # own compiler always goes with an LLVM it has.
    if [ "$(fact linker_ready)" = no ] && on_debian && [ "$(fact sysroot)" != /usr ] &&
        ! has "llvm-config-$(fact llvm)" && ! installed "llvm-$(fact llvm)-dev"; then
        apt_update
        if ! offered "llvm-$(fact llvm)-dev"; then
            need rustc-web cargo-web rust-web-src
            found=$(FAIRWAY_EBPF_TOOLCHAIN=/usr "$root/scripts/ebpf-toolchain.sh")
        fi
    fi
    if [ "$(fact linker_ready)" = no ]; then
        lock
        # Whoever held the lock may have built it.
        found=$(FAIRWAY_EBPF_TOOLCHAIN=$(fact sysroot) "$root/scripts/ebpf-toolchain.sh")
    fi
    if [ "$(fact linker_ready)" = no ]; then
        llvm=$(fact llvm)
        version=$(fact linker_version)
        # The compiler's LLVM decides; bpf-linker has a feature of the same number.
        if on_debian; then
            need "llvm-$llvm-dev" "libpolly-$llvm-dev" zlib1g-dev libzstd-dev
            prefix=/usr/lib/llvm-$llvm
        elif has "llvm-config-$llvm"; then
            prefix=$("llvm-config-$llvm" --prefix)
        else
            die "Install LLVM $llvm's development files (llvm-config-$llvm must be found): $(fact rustc) was built with it."
        fi
        say "building bpf-linker $version for LLVM $llvm (a minute or two)"
        linker=$(fact linker)
        home=${linker%/bin/bpf-linker}
        partial=$home.partial.$$
        trap 'rm -rf "$partial"' EXIT
        trap 'exit 130' INT TERM HUP
        # A build directory of its own: the user's CARGO_TARGET_DIR may be shared.
        LLVM_PREFIX=$prefix CARGO_TARGET_DIR=$partial/target cargo install bpf-linker --version "$version" --locked \
            --no-default-features --features "llvm-$llvm" --root "$partial" >&2 </dev/null ||
            die "bpf-linker $version did not build against LLVM $llvm; the compiler's message is above."
        rm -rf "$partial/target" "$home"
        mv "$partial" "$home" 2>/dev/null || [ -x "$linker" ]
        trap - EXIT INT TERM HUP
    fi
fi

# --- Cargo's own tools --------------------------------------------------------
# Exact versions: they build with Rust 1.95 and later.
tool() { # PROGRAM CRATE VERSION
    has "$1" && return 0
    lock
    has "$1" && return 0
    say "building $2 $3 (a few minutes)"
    cargo install --locked "$2" --version "$3" >&2 </dev/null || die "cargo could not install $2 $3; its message is above."
}
case $purpose in
test) tool cargo-nextest cargo-nextest "$NEXTEST_VERSION" ;;
lint)
    tool cargo-deny cargo-deny "$DENY_VERSION"
    cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 ||
        die "This Rust tool chain has no rustfmt or clippy; add them with: rustup component add rustfmt clippy"
    ;;
esac
