#!/bin/sh
# Runs every fuzz target for some seconds each, or one of them:
#
#   scripts/fuzz.sh [SECONDS [TARGET]]
#
# What is found new goes to fuzz/corpus/TARGET, which is kept; a failing input to
# fuzz/artifacts/TARGET. Needs no nightly compiler: coverage counters are an LLVM
# pass, and there is no unsafe code to sanitize behind these parsers.
set -eu
cd "$(dirname "$0")/../fuzz"

seconds=${1:-60}
only=${2:-}
# See rustc and LLVM: SanitizerCoverage.
RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing -Ccodegen-units=1 -Cforce-frame-pointers"
export RUSTFLAGS
host=$(rustc -vV | sed -n 's/^host: //p')
# With a target named, the flags leave build scripts and macros alone.
cargo build --release --locked --target "$host" --bins

failed=
for source in targets/*.rs; do
    target=$(basename "$source" .rs)
    [ -z "$only" ] || [ "$only" = "$target" ] || continue
    mkdir -p "corpus/$target" "artifacts/$target"
    echo "fuzz: $target for $seconds s" >&2
    "target/$host/release/$target" "corpus/$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 \
        -artifact_prefix="artifacts/$target/" -print_final_stats=1 || failed="$failed $target"
done
[ -z "$failed" ] || { echo "fuzz: failed:$failed (inputs in fuzz/artifacts)" >&2; exit 1; }
