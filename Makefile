# Every target makes what it needs; `make test` is what continuous integration runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
SOURCES := models service training pimc_client tests benchmarks docs docker scripts

.PHONY: demo serve test check lint format client lock checksums sbom audit bench docs clean

# The environment: torch first, so that nothing that depends on it picks another build.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[command,analysis,service,training,demo,docs,dev,supply]'
	touch $@

# What the service and the demo need: no torch, a quarter of the time.
$(VENV)/served: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[command,service,demo]'
	touch $@

demo: $(VENV)/served
	$(BIN)/python docs/demo.py

serve: $(VENV)/served
	PIMC_PORT=$(PORT) $(BIN)/python -m service

test: $(VENV)/ready lint
	$(BIN)/pytest

# What to run while working: everything but load, fuzz, kills, trainings and real data.
check: $(VENV)/ready lint
	$(BIN)/pytest -m "not slow"

lint: $(VENV)/ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/ready
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The synchronous client of the SDK, from the asynchronous one.
client: $(VENV)/ready
	$(BIN)/python scripts/generate_sync_client.py

# Every package of the images with its sha256, from the public index.
lock: $(VENV)/ready
	$(BIN)/python scripts/lock.py

# The list of the built-in bundles' files, after one of them has changed.
checksums:
	cd models/zoo && LC_ALL=C sha256sum */card.json */*.onnx > SHA256SUMS

# What the images hold, as CycloneDX with licences, in build/sbom: from the metadata of the packages
# that the lock files install. IMAGES names some of the lock files; all without it.
sbom: $(VENV)/ready
	$(BIN)/python scripts/sbom.py $(IMAGES)

# Known vulnerabilities of what the images hold. Needs the public index; a package that it does not
# have fails as well.
audit: $(VENV)/ready
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --progress-spinner off \
		$(foreach file,$(wildcard docker/locked/*.txt),--requirement $(file))

# The documentation as a site, in build/site. Strict: a broken link fails.
docs: $(VENV)/ready
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict --quiet

# Ratios of things measured in one run; the benchmarks say what they compare.
bench: $(VENV)/peers
	$(BIN)/python -m benchmarks --out bench.json

# What others use. Of rslearn one file is taken, which carries Presto; what the rest of it needs (a
# training framework, torchvision, readers of stores) is not.
$(VENV)/peers: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(BIN)/pip install --quiet --no-deps rslearn==0.1.19
	touch $@

clean:
	rm -rf $(VENV) demo build bench.json *.egg-info
