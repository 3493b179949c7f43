# Two doors: `make demo` shows what Afterimage does, `make test` checks it. Both install what is
# missing on a Debian 12 machine first (as root, or through sudo).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: demo test check soak mutants fuzz bench fleet setup setup-test setup-bench build install

CARGO ?= cargo
PREFIX ?= /usr/local
# The simulated worlds of a soak.
SEEDS ?= 0..1000000

demo: setup build
	./target/release/afterimage demo $(DEMO)

# Programs and tests in one go: built apart, what they stand on would be built twice, with other features.
test: setup-test
	$(CARGO) build --locked --workspace --bins --tests
	$(CARGO) test --locked --workspace --no-fail-fast

# What a change must pass before it is proposed: form, lints, licences and advisories, docs.
check: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps --document-private-items
	./scripts/setup cargo-deny
	$(CARGO) deny --locked check licenses bans sources advisories

# The long tests: hours of random histories, kills and link cuts.
soak: setup-test
	AFTERIMAGE_SOAK=1 $(CARGO) test --locked --workspace --release --no-fail-fast -- --include-ignored --nocapture
	$(CARGO) run --locked --release -p afterimage-simulate --bin afterimage-simulate -- --coverage --seeds $(SEEDS)

# Breaks the product on purpose, one way after another, and fails if the simulation does not see it.
mutants: setup
	$(CARGO) run --locked -p afterimage-simulate --bin afterimage-mutants -- $(MUTANTS)

# One door under random inputs, such as `make fuzz TARGET=log RUNS=10000000`; `scripts/fuzz list` names all.
fuzz: setup
	./scripts/fuzz run "$(TARGET)" "$(or $(RUNS),10000000)"

bench: setup-bench build
	$(CARGO) run --locked --release -p afterimage-bench -- $(BENCH)

# A fleet's night, simulated: writes docs/fleet/.
fleet:
	$(CARGO) run --locked --release -p afterimage-fleet -- $(FLEET)

build:
	$(CARGO) build --locked --release -p afterimage-cli

install: build
	install -D -m 755 target/release/afterimage $(DESTDIR)$(PREFIX)/bin/afterimage

setup:
	@./scripts/setup base

setup-test:
	@./scripts/setup base libvirt guest fsx servers others

setup-bench:
	@./scripts/setup base bench
