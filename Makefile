# Each target first sets up .venv if it is missing or out of date. Another interpreter: make PYTHON=python3.12 …
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)

BIN := .venv/bin
VENV := .venv/.installed

# Airflow has an environment of its own, as in production: the pipeline's versions are not its business, nor the reverse.
AIRFLOW := apache-airflow apache-airflow-providers-apache-beam apache-airflow-providers-google pytest pytest-timeout
AIRFLOW_VENV := .venv-airflow/.installed

# Prism and the program that starts SDK workers, of the Beam that is locked.
BEAM := v$(shell sed -n 's/^apache-beam==//p' constraints.txt)
ENGINES := .engines/.installed

TRACKING_URI := sqlite:///demo/mlflow.db
TRAIN := $(BIN)/python examples/train_two_tower.py --tracking_uri=$(TRACKING_URI) --artifact_root=demo/artifacts
HISTORIZE := $(BIN)/python -m beam_pipeline --tracking_uri=$(TRACKING_URI) --warehouse=demo/warehouse
SEARCH := $(BIN)/python -m beam_pipeline.search --warehouse=demo/warehouse --k=5
COMPARE := $(BIN)/python -m beam_pipeline.compare --warehouse=demo/warehouse

define WRITE_LOCK
import json
print("# Every package, for Python 3.11 on Linux. Made by `make lock`; not edited by hand.")
for package in sorted(
    f"{item['metadata']['name'].lower()}=={item['metadata']['version']}"
    for item in json.load(open(".venv-lock/report.json"))["install"]
    if "dir_info" not in item["download_info"]  # the project itself
):
    print(package)
endef
export WRITE_LOCK

.PHONY: help demo check unit test mutants fuzz test-airflow test-engines lint bench lock test-gcp gcp-variables clean

help:
	@echo 'make demo      train a small model twice, historize both, search them, compare them (in demo/)'
	@echo 'make check     lint, types and unit tests, while you work: a minute and a half'
	@echo 'make test      run all tests, two at a time'
	@echo 'make mutants [MODULE=reading.tally]   change the modules that guard the promise and see which unit tests notice (an hour)'
	@echo 'make fuzz [NUMBER=20000] [SEED=1]   damage real models, and files of vectors, ids and features, that often and read them'
	@echo 'make test-airflow   run the DAG of examples/airflow in real Airflow (another environment, .venv-airflow)'
	@echo 'make test-engines   run the job on Prism and other engines, workers in other processes, and kill workers (needs Go)'
	@echo 'make lint      check style, format, types and the Dockerfile'
	@echo 'make bench     measure against the ways this replaces; writes docs/benchmark.md (half an hour, on a quiet machine)'
	@echo 'make lock      resolve all dependencies afresh into constraints.txt and tests/airflow/constraints.txt (Python 3.11)'
	@echo 'make test-gcp PROJECT=… DATASET=… BUCKET=…   run what only the real services can prove'
	@echo 'make clean     delete environments, demo and caches'

# The lock is for Python 3.11; other versions resolve by themselves. Bytecode is compiled here because an environment
# may forbid Python to write it later, and importing TensorFlow without it takes 9 s instead of 4; not by pip, which
# takes one processor for it.
$(VENV): setup.py constraints.txt
	@echo 'Setting up .venv: a few minutes, once.'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	lock=$$($(BIN)/python -c 'import sys; print("-cconstraints.txt" if sys.version_info[:2] == (3, 11) else "")') && \
	$(BIN)/python -m pip install -qq --no-compile $$lock -e '.[launcher,report,warehouse,train,test,bench,lint]'
	$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
	touch $@

# The week between the two trainings changes who listens to one item.
demo: $(VENV)
	rm -rf demo
	mkdir demo
	$(TRAIN) --start=2026-03-01T23:30 --seed=1 > demo/first_run
	$(TRAIN) --start=2026-03-08T23:30 --seed=2 --moved_item=item-jazz-007 > demo/second_run
	$(HISTORIZE) --run_id="$$(cat demo/first_run)"
	$(HISTORIZE) --run_id="$$(cat demo/second_run)"
	$(SEARCH) --item=item-jazz-007 --date=2026-03-01
	$(SEARCH) --item=item-jazz-007
	$(COMPARE) --report=demo/changes.html

# Each worker has emulators of its own, and a file's tests stay together. Files are handed out in their order, whole
# jobs first and unit tests last: those fill the gap at the end, where a long file would leave a worker idle.
PYTEST := $(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder

# Side by side: the tests wait now and then, and the types take one processor.
check: $(VENV)
	@$(MAKE) --no-print-directory --jobs=2 lint unit

unit: $(VENV)
	$(PYTEST) tests/unit

test: $(VENV)
	$(PYTEST)

# Lists the changes ("mutants") that no unit test noticed; docs/verification.md says which are known. One module:
# make mutants MODULE=reading.tally
mutants: $(VENV)
	@$(BIN)/python -m pip install -qq -cconstraints.txt -e '.[mutants]'
	@mkdir -p mutants .cache
	@ln -sfn ../.cache mutants/.cache
	@echo 'A change takes a second or two; how far it is: tail -f mutants/log'
	@$(BIN)/mutmut run --max-children 2 $(if $(MODULE),'beam_pipeline.$(MODULE).*') >mutants/log 2>&1 || { tail -n 40 mutants/log; exit 1; }
	@$(BIN)/mutmut results --all 1 | grep '^ *beam_pipeline\.$(MODULE)' >mutants/results
	@grep -v ': killed$$' mutants/results || true
	@sed 's/.*: //' mutants/results | sort | uniq -c
	@echo 'See one: $(BIN)/mutmut show NAME'

NUMBER ?= 20000
SEED ?= 1
fuzz: $(VENV)
	$(BIN)/python tests/support/fuzz.py --number=$(NUMBER) --seed=$(SEED)
	$(BIN)/python tests/support/fuzz_files.py --number=$(NUMBER) --seed=$(SEED)

$(AIRFLOW_VENV): tests/airflow/constraints.txt
	@echo 'Setting up .venv-airflow: two minutes, once.'
	rm -rf .venv-airflow
	$(PYTHON) -m venv .venv-airflow
	.venv-airflow/bin/python -m pip install -qq -c tests/airflow/constraints.txt $(AIRFLOW)
	touch $@

# The project's conftest.py is not for Airflow's environment.
test-airflow: $(VENV) $(AIRFLOW_VENV)
	.venv-airflow/bin/python -m pytest tests/airflow --confcutdir=tests/airflow

# JOB_ENDPOINT=HOST:PORT runs the rows on one more engine, a Beam job service that is running, such as Flink's.
$(ENGINES): constraints.txt
	@command -v go >/dev/null || { echo 'make test-engines needs Go, which builds Prism: there is no go here' >&2; exit 1; }
	@echo 'Building .engines: one to two minutes, once.'
	mkdir -p .engines
	GOBIN=$(CURDIR)/.engines go install \
		github.com/apache/beam/sdks/v2/go/cmd/prism@$(BEAM) github.com/apache/beam/sdks/v2/python/container@$(BEAM)
	mv .engines/container .engines/boot
	touch $@

test-engines: $(VENV) $(ENGINES)
	BEAM_PIPELINE_JOB_ENDPOINT='$(JOB_ENDPOINT)' $(BIN)/python -m pytest tests/engines

lint: $(VENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

bench: $(VENV)
	$(BIN)/python benchmarks/bench.py

# Resolved from setup.py alone, ignoring the old lock and what is installed.
lock:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "the lock is for Python 3.11")'
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -qq --dry-run --ignore-installed --report .venv-lock/report.json \
		'.[launcher,report,warehouse,train,test,mutants,bench,lint]'
	.venv-lock/bin/python -c "$$WRITE_LOCK" > constraints.txt
	.venv-lock/bin/python -m pip install -qq --dry-run --ignore-installed --report .venv-lock/report.json $(AIRFLOW)
	.venv-lock/bin/python -c "$$WRITE_LOCK" > tests/airflow/constraints.txt
	rm -rf .venv-lock

gcp-variables:
	@$(foreach name,PROJECT DATASET BUCKET,$(if $($(name)),,$(error make test-gcp needs PROJECT=… DATASET=… BUCKET=…: $(name) is missing)))true

test-gcp: gcp-variables $(VENV)
	BEAM_PIPELINE_GCP_PROJECT='$(PROJECT)' BEAM_PIPELINE_GCP_DATASET='$(DATASET)' BEAM_PIPELINE_GCP_BUCKET='$(BUCKET)' \
		$(BIN)/python -m pytest tests/gcp

clean:
	rm -rf .venv .venv-airflow .venv-lock .engines .cache mutants demo bench build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
