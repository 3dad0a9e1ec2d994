#!/bin/sh
# Finds the tool chain that can compile ebpf/ and prints it as key=value lines:
#
#   rustc, cargo   the compiler and its cargo, by absolute path
#   sysroot        where it keeps the core library's source
#   llvm           the major version of its LLVM
#   linker         the bpf-linker built against that LLVM, or where setup puts it
#   linker_ready   yes or no
#
# The BPF target has no prebuilt core library, so a compiler qualifies when the
# library's source lies beside it: a rustup tool chain with rust-src, or Debian's
# rustc-web with rust-web-src. A tool chain whose linker is ready is preferred.
# Both build.rs and setup.sh ask here, so that they never disagree. Exits 3 and
# says what to install when no compiler qualifies.
#
# FAIRWAY_EBPF_TOOLCHAIN=DIR considers only DIR/bin/rustc and DIR/bin/cargo.
# FAIRWAY_BPF_LINKER=FILE uses that linker. FAIRWAY_CACHE=DIR moves the cache.
set -eu

BPF_LINKER_VERSION=0.13.0
cache=${FAIRWAY_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/fairway}

# Directories that hold bin/rustc and bin/cargo, one a line, best first.
candidates() {
    if [ -n "${FAIRWAY_EBPF_TOOLCHAIN:-}" ]; then
        echo "$FAIRWAY_EBPF_TOOLCHAIN"
        return
    fi
    for dir in "${RUSTUP_HOME:-${HOME:-/root}/.rustup}"/toolchains/nightly-* \
        "${RUSTUP_HOME:-${HOME:-/root}/.rustup}"/toolchains/*; do
        [ -d "$dir" ] && echo "$dir"
    done
    echo /usr
}

report() { # DIR LLVM LINKER READY
    printf 'rustc=%s\ncargo=%s\nsysroot=%s\nllvm=%s\nlinker_version=%s\nlinker=%s\nlinker_ready=%s\n' \
        "$1/bin/rustc" "$1/bin/cargo" "$1" "$2" "$BPF_LINKER_VERSION" "$3" "$4"
}

fallback=
while IFS= read -r dir; do
    [ -x "$dir/bin/rustc" ] && [ -x "$dir/bin/cargo" ] || continue
    [ -f "$dir/lib/rustlib/src/rust/library/core/src/lib.rs" ] || continue
    llvm=$("$dir/bin/rustc" -vV 2>/dev/null | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
    [ -n "$llvm" ] || continue
    linker=${FAIRWAY_BPF_LINKER:-$cache/bpf-linker-$BPF_LINKER_VERSION-llvm$llvm/bin/bpf-linker}
    # Run it: a linker whose LLVM was removed since is not ready.
    if [ -x "$linker" ] && "$linker" --version >/dev/null 2>&1; then
        report "$dir" "$llvm" "$linker" yes
        exit 0
    fi
    [ -n "$fallback" ] || fallback=$(report "$dir" "$llvm" "$linker" no)
done <<EOF
$(candidates)
EOF

if [ -n "$fallback" ]; then
    printf '%s\n' "$fallback"
    exit 0
fi
cat >&2 <<'EOF'
No Rust compiler here has the core library's source, which the BPF target needs.
Run `scripts/setup.sh` as root (Debian: it installs rustc-web, cargo-web and rust-web-src),
or `rustup toolchain install nightly --component rust-src`,
or set FAIRWAY_EBPF_OBJECT to a compiled object.
EOF
exit 3
