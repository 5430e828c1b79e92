# Every target builds its prerequisites; continuous integration runs `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
SOURCES := models service training pimc_client tests benchmarks docs docker scripts qgis

.PHONY: demo explore serve test check all-tests quick-tests lint format client lock checksums sbom audit bench docs clean

# The whole environment. torch is installed first, so that no dependent package selects another build.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[command,analysis,service,cluster,tracing,training,demo,docs,dev,supply]'
	touch $@

# The environment of the service and the demo: without torch, in a quarter of the time.
$(VENV)/served: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[command,service,demo]'
	touch $@

# STACK=folder takes your own stack instead of the demo's.
demo: $(VENV)/served
	$(BIN)/python docs/demo.py $(if $(STACK),--stack "$(STACK)")

# The demo's stack in the explorer, until stopped.
explore: $(VENV)/served
	$(BIN)/python docs/demo.py --explore --port $(PORT) $(if $(STACK),--stack "$(STACK)")

serve: $(VENV)/served
	PIMC_PORT=$(PORT) $(BIN)/python -m service

# A file's tests stay together, as they share services and models; files keep the order of
# tests/conftest.py, the longest first. The tests that are run while working keep a core busy, so
# they have two processes. Of all tests many wait for another process, a time limit or a browser,
# so they have three for two cores. Each process has one thread of OpenMP: with more, those of one
# process would wait actively for a core that another one has.
IN_PARALLEL := --dist loadfile --no-loadscope-reorder --numprocesses
all-tests quick-tests: export OMP_NUM_THREADS := 1
# pytest keeps the test files that it has compiled, which takes 7 s for each process of the next run.
unexport PYTHONDONTWRITEBYTECODE

# The linters run beside the tests: mypy keeps one core busy while pytest starts.
test: $(VENV)/ready
	$(MAKE) --no-print-directory --jobs 2 lint all-tests

# The tests to run while working, in under two minutes: each part's core behaviour, on tiny models.
# Files that are slow as a whole are not even imported.
check: $(VENV)/ready
	$(MAKE) --no-print-directory --jobs 2 lint quick-tests

all-tests: $(VENV)/ready
	$(BIN)/pytest $(IN_PARALLEL) 3

SLOW = $(shell grep -l '^pytestmark = pytest.mark.slow' tests/test_*.py)
quick-tests: $(VENV)/ready
	$(BIN)/pytest $(IN_PARALLEL) 2 -m "not slow" $(SLOW:%=--ignore=%)

lint: $(VENV)/ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/ready
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# Generates the SDK's synchronous client from the asynchronous one.
client: $(VENV)/ready
	$(BIN)/python scripts/generate_sync_client.py

# Writes the lock files: every package of the images with its sha256, from the public index.
lock: $(VENV)/ready
	$(BIN)/python scripts/lock.py

# Writes the sha256 of the built-in bundles' files; run it after one of them has changed.
checksums:
	cd models/zoo && LC_ALL=C sha256sum */card.json */*.onnx > SHA256SUMS

# Writes the bills of materials of the images to build/sbom, as CycloneDX with licences, from the
# metadata of the locked packages. IMAGES selects lock files by name; the default is all.
sbom: $(VENV)/ready
	$(BIN)/python scripts/sbom.py $(IMAGES)

# Checks the packages of the images for known vulnerabilities. Needs the public index; a package that
# the index does not have is an error, too.
audit: $(VENV)/ready
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --progress-spinner off \
		$(foreach file,$(wildcard docker/locked/*.txt),--requirement $(file))

# Builds the documentation as a site in build/site. Strict: a broken link is an error.
docs: $(VENV)/ready
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict --quiet

# Runs the benchmarks, which report ratios of measurements of the same run.
bench: $(VENV)/peers
	$(BIN)/python -m benchmarks --out bench.json

# The peers of the benchmark. rslearn is installed without its dependencies (a training framework,
# torchvision, storage clients), because only its file with Presto is used.
$(VENV)/peers: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(BIN)/pip install --quiet --no-deps rslearn==0.1.19
	touch $@

clean:
	rm -rf $(VENV) demo build bench.json *.egg-info
