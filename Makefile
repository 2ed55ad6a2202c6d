# The two commands of a newcomer are `make demo` and `make test`; both set up .venv first. `make help` lists the rest.

# onnxruntime for the CPU, or onnxruntime-gpu (with its CUDA libraries) where an NVIDIA driver answers.
ORT ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready-$(ORT)
RUN := $(VENV)/bin/
comma := ,

.PHONY: help setup demo test fuzz verify-parity verify-cuda lint format bench bench-cuda soak clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY) ## Make .venv and install the project into it (ORT=cpu or ORT=gpu)

# The two onnxruntime packages own the same folder, so the other one goes first.
$(READY): pyproject.toml constraints.txt
	@case "$(ORT)" in cpu|gpu) ;; *) echo "ORT must be cpu or gpu, got '$(ORT)'" >&2; exit 2;; esac
	@test -x $(RUN)python || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.ready-*
	@echo "installing into $(VENV) (onnxruntime: $(ORT)) ..."
	@$(RUN)python -m pip uninstall -q -y $(if $(filter gpu,$(ORT)),onnxruntime,onnxruntime-gpu) 2>/dev/null
	@$(RUN)python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[export,dev,$(ORT)$(if $(filter cpu,$(ORT)),$(comma)genai)]"
	@touch $@

demo: $(READY) ## Export the demo model, prove it, and print text with it
	$(RUN)cosmos-export onnx --out bundles/demo --overwrite
	$(RUN)cosmos-run generate bundles/demo --prompt "ROMEO:" --seed 1 --max-new-tokens 200

# A file's tests stay together, as they share what is exported for them; files go in order, the long ones first. Each
# process has a processor of its own (tests/conftest.py). For one after another: make test PYTEST=
PYTEST ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(READY) ## Run the tests, as many at a time as there are processors, four at most
	OMP_NUM_THREADS=1 $(RUN)python -m pytest $(PYTEST)

MINUTES ?= 10
fuzz: $(READY) ## Alter bundles and checkpoints for MINUTES, and see that errors are typed; findings in build/fuzz
	OMP_NUM_THREADS=1 $(RUN)python -m tests.fuzz --minutes $(MINUTES)

verify-parity: $(READY) ## Export and prove the demo, beginner and reduced advanced models; reports in build/parity
	$(RUN)python -m tests.verify_parity

verify-cuda: $(READY) ## On an NVIDIA GPU: its tests, and the proof of the recipes for GPUs; result in benchmarks/results
	$(RUN)python -m tests.verify_cuda

lint: $(READY) ## ruff (lint and format) and mypy
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy

format: $(READY) ## Let ruff put the code in order
	$(RUN)ruff check --fix .
	$(RUN)ruff format .

bench: $(READY) ## Time the runtime beside the other engines that are installed; results in benchmarks/results
	@$(RUN)python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(RUN)python -m benchmarks.full_sequence
	$(RUN)python -m benchmarks.cpu_decode

soak: $(READY) ## 2,000 generations with changing inputs, and what memory does meanwhile
	$(RUN)python -m benchmarks.soak

bench-cuda: $(READY) ## Time decoding on an NVIDIA GPU beside transformers, eager and compiled
	@$(RUN)python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(RUN)python -m benchmarks.cuda_decode
	$(RUN)python -m benchmarks.cuda_report

clean: ## Remove what the other targets made, except .venv
	rm -rf build bundles .pytest_cache .mypy_cache .ruff_cache .hypothesis
