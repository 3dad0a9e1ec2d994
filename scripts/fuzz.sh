#!/bin/sh
# Runs every fuzz target for some seconds each, or one of them:
#
#   scripts/fuzz.sh [SECONDS [TARGET]]
#   scripts/fuzz.sh keep [TARGET]
#
# What is found new goes to fuzz/found/TARGET; a failing input to
# fuzz/artifacts/TARGET. `keep` adds to fuzz/corpus/TARGET, which is in the
# repository, the few that cover most. Needs no nightly compiler: coverage counters are an LLVM
# pass, and there is no unsafe code to sanitize behind these parsers.
set -eu
cd "$(dirname "$0")/../fuzz"

seconds=${1:-60}
# Of a target: bytes of an input, of all, and how many.
KEPT_INPUT=1500
KEPT_BYTES=120000
KEPT_FILES=120
only=${2:-}
# See rustc and LLVM: SanitizerCoverage.
RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing -Ccodegen-units=1 -Cforce-frame-pointers"
export RUSTFLAGS
host=$(rustc -vV | sed -n 's/^host: //p')
# With a target named, the flags leave build scripts and macros alone.
cargo build --release --locked --target "$host" --bins

# The largest first: each covers the most.
keep() {
    found=$(mktemp -d)
    "target/$host/release/$1" -set_cover_merge=1 -max_len="$KEPT_INPUT" "$found" "corpus/$1" "found/$1" 2>/dev/null
    bytes=$(cat "corpus/$1"/* | wc -c)
    files=$(ls "corpus/$1" | wc -l)
    for input in $(ls -S "$found"); do
        size=$(wc -c <"$found/$input")
        [ "$files" -lt "$KEPT_FILES" ] && [ $((bytes + size)) -le "$KEPT_BYTES" ] || continue
        [ -e "corpus/$1/$input" ] || mv "$found/$input" "corpus/$1/"
        bytes=$((bytes + size)) files=$((files + 1))
    done
    rm -rf "$found"
    echo "fuzz: $1 keeps $(ls "corpus/$1" | wc -l) inputs" >&2
}

failed=
for source in targets/*.rs; do
    target=$(basename "$source" .rs)
    [ -z "$only" ] || [ "$only" = "$target" ] || continue
    mkdir -p "corpus/$target" "found/$target" "artifacts/$target"
    if [ "$seconds" = keep ]; then
        keep "$target"
        continue
    fi
    echo "fuzz: $target for $seconds s" >&2
    "target/$host/release/$target" "found/$target" "corpus/$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 \
        -artifact_prefix="artifacts/$target/" -print_final_stats=1 || failed="$failed $target"
done
[ -z "$failed" ] || { echo "fuzz: failed:$failed (inputs in fuzz/artifacts)" >&2; exit 1; }
