# Two commands matter: `make demo` and `make test`. Everything runs in ./.venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

ROOM ?=

.PHONY: demo test quick check ui bench clean
demo: $(STAMP)
	$(BIN)/python -m eaft_prune $(ARGS)

# one process a core, each with one thread; a file's tests share their runs, so they stay together
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

# no process starts, no training: make quick ROOM=maths
quick: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --quick tests/$(ROOM) $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

ui: $(STAMP)
	@echo 'open http://127.0.0.1:5000/#/experiments?workflowType=machine_learning'
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --backend-store-uri sqlite:///mlruns/mlflow.db $(ARGS)

bench: $(STAMP)
	$(BIN)/python benchmarks/cpu_throughput.py $(ARGS)

# constraints.txt pins torch to a version, not a build: pip takes the CPU build where its index
# offers one (README, "Install"). --no-compile: compiling everything takes a minute; what is imported
# is compiled here, as a start without compiled files takes 20 seconds.
IMPORTED := eaft_prune.cli.launch, eaft_prune.engines.transformers, mlflow.store.tracking.sqlalchemy_store, \
	transformers.models.gpt_oss.modeling_gpt_oss, optuna, plotly.graph_objects
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -c 'import $(IMPORTED)'
	touch $(STAMP)

clean:
	rm -rf $(VENV) mlruns outputs multirun store checkpoints
