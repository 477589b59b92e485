# What people do with this repository. `make` alone tells what there is.

SHELL := /bin/bash
CARGO ?= cargo
ARGS ?=
# Programs written in Python and Node that the stories talk to; everything else comes from the system's packages.
export SHEETBEND_TEST_TOOLS := $(CURDIR)/target/tools

.PHONY: help demo test test-tools simulate bench lint docs

help: ## What there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'
	@echo '  make demo ARGS="--for 10s -o json"'

demo: ## A small shop on loopback, its sidecars, and a live graph of it. Ctrl-C ends it
	@$(CARGO) build --workspace --bins
	@exec "$$($(CARGO) metadata --no-deps --offline --format-version 1 | sed -E 's/.*"target_directory":"([^"]*)".*/\1/')/debug/demo" $(ARGS)

test: test-tools ## Install what the tests need, then run every test; a missing tool is a failure
	SHEETBEND_TEST_STRICT=1 $(CARGO) test --workspace --no-fail-fast

test-tools:
	@tests/install-tools

simulate: ## The proxies' judgement in virtual time, from many seeds: ARGS="--seeds 100000 verdicts", or ARGS="--seed 7"
	@seeds=10000 only=; set -- $(ARGS); \
	while [ $$# -gt 0 ]; do case "$$1" in \
	--seeds) seeds=$$2; shift 2 ;; \
	--seed) export SHEETBEND_SEED=$$2; shift 2 ;; \
	*) only="$$only $$1"; shift ;; \
	esac; done; \
	SHEETBEND_SEEDS=$$seeds CARGO_PROFILE_DEV_OPT_LEVEL=2 $(CARGO) test -p sheetbend-proxy --test simulation -- $$only

bench: ## The whole beside nginx, HAProxy and Envoy, on this machine
	@benches/run $(ARGS)

lint: ## Formatting and clippy
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

docs: ## The crates' documentation, without warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --document-private-items
