#!/bin/sh
# Runs every test in parallel and closes with how many passed, failed and were
# skipped, and why. Arguments go to `cargo nextest run`.
#
# A test that lacks a kernel feature or a program passes for nextest; it says so
# in the file that FAIRWAY_SKIPPED names, and is counted as skipped here. So does
# one that runs others on another kernel: each of them is counted.
set -u
cd "$(dirname "$0")/.." || exit 1

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP
FAIRWAY_SKIPPED=$work/skipped
export FAIRWAY_SKIPPED
: >"$FAIRWAY_SKIPPED"

# `tee` must not hide the runner's status.
{
    cargo nextest run --workspace --no-fail-fast "$@" 2>&1
    echo $? >"$work/status"
} | tee "$work/log"
status=$(cat "$work/status" 2>/dev/null || echo 1)

# Counts on nextest's summary line: "N tests run: N passed (…), N failed, …".
count() {
    sed 's/\x1b\[[0-9;]*m//g' "$work/log" | grep -E '^ *Summary ' | tail -n 1 |
        grep -oE "[0-9]+ $1" | awk '{ n += $1 } END { print n + 0 }'
}
passed=$(count passed)
# A test that ended in time-out or could not start did not pass either.
failed=$(($(count failed) + $(count 'timed out') + $(count 'exec failed')))

names=$(sed -n 's/^SKIPPED: //p' "$FAIRWAY_SKIPPED" | sort -u)
skipped=$(printf '%s\n' "$names" | grep -c .)
[ -z "$names" ] || printf '\nskipped for a missing feature:\n%s\n' "$names" | sed 's/^/  /; s/^  skipped/skipped/; s/^  $//'
# Those that ran inside another test: the runner has not counted them.
elsewhere=$(sed -n 's/^RAN: //p' "$FAIRWAY_SKIPPED" | sort -u | grep -c .)
[ "$elsewhere" = 0 ] || printf '\n%s of the tests ran on other kernels too\n' "$elsewhere"
passed=$((passed + elsewhere))
# Each of them was counted as passed.
passed=$((passed > skipped ? passed - skipped : 0))
ignored=$(count skipped)
[ "$ignored" = 0 ] || printf '\n%s tests are marked #[ignore]\n' "$ignored"

printf '\n%s passed, %s failed, %s skipped\n' "$passed" "$failed" "$((skipped + ignored))"
exit "$status"
