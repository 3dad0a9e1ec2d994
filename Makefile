# The verbs of this repository. Each installs what it lacks first
# (scripts/setup.sh); the second time that takes a moment.

SHELL := /bin/sh
# rustup's tools, also under sudo.
export PATH := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH):/usr/sbin:/sbin
# All comparisons, or one: make bench SUITE=cni
SUITE ?= cni network services policy

.PHONY: help setup demo test lint bench fuzz clean

help:
	@echo 'make demo            bring up a VPC on this machine, run pods in it, print what happened'
	@echo 'make test            every test, those that need root included'
	@echo 'make lint            rustfmt, clippy, licences and sources of dependencies'
	@echo 'make bench SUITE=cni comparisons, as ratios of the same run; without SUITE all of them'
	@echo 'make fuzz TIME=60    every fuzz target for so many seconds'
	@echo 'make setup           only install what a build lacks'
	@echo 'make clean           remove what builds have left here; caches outside stay'

setup:
	@scripts/setup.sh build

demo:
	@scripts/setup.sh demo
	cargo build --release --locked
	@target/release/fairway lab demo

test:
	@scripts/setup.sh test
	@scripts/test.sh

lint:
	@scripts/setup.sh lint
	cargo fmt --check
	cargo fmt --check --manifest-path ebpf/Cargo.toml
	cargo clippy --workspace --lib --bins --locked -- -D warnings
# A test fails by panicking, in its helper functions too.
	cargo clippy --workspace --tests --benches --locked -- -D warnings -A clippy::unwrap_used -A clippy::expect_used
	cargo deny --locked --log-level error check licenses bans sources
	cargo deny --locked --log-level error --config deny.toml --manifest-path ebpf/Cargo.toml check licenses bans sources
	cargo deny --locked --log-level error --config deny.toml --manifest-path shim/Cargo.toml check licenses bans sources

bench:
	@scripts/setup.sh bench
	cargo build --release --locked
	@for suite in $(SUITE); do target/release/fairway bench $$suite || exit 1; done

fuzz:
	@scripts/setup.sh build
	@scripts/fuzz.sh $(TIME)

clean:
	cargo clean
	cargo clean --manifest-path ebpf/Cargo.toml
	cargo clean --manifest-path shim/Cargo.toml
