# What a person types. Everything runs in .venv, which is made on first use; nothing else of the machine is changed.
#
#   make train     train the bundled example in about 3 minutes on 2 cores, into runs/tiny
#   make lifecycle the same model instructed, adapted, aligned, compressed and measured: runs/lifecycle/report.html
#                  (CONFIG=configs/lifecycle/tiny.py:t5: an encoder-decoder, runs/lifecycle_t5)
#   make test      the test suite
#   make check     what .ci/run runs: lint, types, doctests, tests
#   make nightly   the slow tests, the long crash tests and the plan of Llama 3 8B on a pod
#   make gpu-wheels  packages for tools/gpu_report.py on a CUDA image without a network
#   make help      this list
#
# Variables: PYTHON (3.11 or newer), TORCH_INDEX (a package index that holds torch for the CPU alone, which is far
# smaller than the default one), CONSTRAINTS (empty: newest versions that pyproject.toml allows), WORKERS, TESTS.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

VENV := .venv
RUN := $(VENV)/bin/python
# Version 4 of transformers, which cannot stand beside 5: it reads what is converted (tests/convert). Without torch.
OLD := .venv-transformers-4
WORKERS ?= 2
TESTS ?=
WORKDIR ?= runs/tiny
CONFIG ?= configs/lifecycle/tiny.py
LIFECYCLE ?=
TORCH_INDEX ?=

# The first interpreter that is new enough and can make environments; 3.11 first, as constraints.txt was tested on it.
ABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	"$$python" -c "$(ABLE)" 2>/dev/null && echo "$$python" && break; done)

.PHONY: help train lifecycle test install install-test transformers-4 check lint format types doctest nightly test-gpu \
	gpu-wheels constraints clean

help:
	@sed -n 's/^#   make /  make /p' Makefile

train: $(VENV)/.installed
	$(RUN) -m t5x_like train --config=configs/pretrain/tiny.py --workdir=$(WORKDIR)
	@echo "a sample:"
	@$(RUN) -m t5x_like generate $(WORKDIR) --prompt="ROMEO:" --temperature=0.8 --max_new_tokens=160

lifecycle: $(VENV)/.installed-eval
	$(RUN) -m tools.lifecycle --config=$(CONFIG) $(if $(LIFECYCLE),--folder=$(LIFECYCLE))

test: $(VENV)/.installed-test $(OLD)/.installed
	$(RUN) -m pytest -q -n $(WORKERS) --dist loadscope --no-loadscope-reorder --durations=15 $(TESTS)

check: lint types doctest test

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.installed-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(VENV)/.installed-test
	$(VENV)/bin/pyright

doctest: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(RUN) -m pytest -q --doctest-modules t5x_like

nightly: $(VENV)/.installed-test $(OLD)/.installed
	$(RUN) -m pytest -q -n $(WORKERS) --dist loadscope --no-loadscope-reorder --durations=15 -m "not gpu and not tpu" $(TESTS)
	$(RUN) tools/crash_test.py
	$(RUN) tools/crash_test.py --processes=2 --devices=4
	$(RUN) -m t5x_like plan --config=configs/pretrain/llama3_8b.py --topology=v5p:4x4x4

# Tests that need an accelerator; on a machine without one they are not collected.
test-gpu: $(VENV)/.installed-test
	T5X_LIKE_TEST_PLATFORM=cuda $(RUN) -m pytest -q -m gpu

# What a CUDA image with jax, flax and torch may lack, with all that it needs, for its Python 3.12: tools/gpu_report.py
# unpacks those that are missing there. They travel with the checkout, hence the limit.
GPU_WHEELS := absl-py aiofiles beartype etils fsspec humanize iniconfig jaxtyping ml-collections msgpack \
	orbax-checkpoint packaging pluggy prometheus-client protobuf psutil pygments pytest pyyaml simplejson \
	tensorboardX tensorstore typing-extensions uvloop wadler-lindig zipp
GPU_PLATFORMS := manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 \
	manylinux1_x86_64
gpu-wheels: $(VENV)/.made
	rm -rf build/gpu-wheels
	$(RUN) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation=cp \
		--python-version=3.12 $(GPU_PLATFORMS:%=--platform=%) --constraint=constraints.txt --dest=build/gpu-wheels $(GPU_WHEELS)
	@size=$$(du -sm build/gpu-wheels | cut -f1); echo "build/gpu-wheels: $$size MiB"; \
		test "$$size" -lt 60 || { echo "make: build/gpu-wheels has $$size MiB; the limit is 60" >&2; exit 1; }

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test
transformers-4: $(OLD)/.installed

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "make: no Python from 3.11 to 3.14 with venv and ensurepip was found;" \
		"install one (Debian: python3 python3-venv) or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Versions are pinned where constraints.txt was tested, on Python 3.11; elsewhere pyproject.toml bounds them.
CONSTRAINTS ?= $(shell test -x $(RUN) && $(RUN) -c "import sys; print('constraints.txt' * (sys.version_info[:2] == (3, 11)))")
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing t5x_like into $(VENV) (a minute or two)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/.made
	@$(RUN) -c "import sys; sys.exit(sys.version_info[:2] > (3, 13))" || { echo "make: the test extras need Python" \
		"3.11 to 3.13 (tensorflow-text has no later build): make clean, then make PYTHON=python3.13 ..." >&2; exit 1; }
	@echo "installing t5x_like with its test extras into $(VENV) (several GB, some minutes)"
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[test]'
	@touch $@ $(VENV)/.installed

# Evaluation needs lm-evaluation-harness, which brings torch along. Whoever has the test extras has it.
$(VENV)/.installed-eval: pyproject.toml constraints.txt | $(VENV)/.made
	@$(RUN) -c "import lm_eval, t5x_like" 2>/dev/null || { echo "installing lm-evaluation-harness into $(VENV) (some minutes)"; \
		$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[eval]'; }
	@touch $@

$(OLD)/.installed: | $(VENV)/.made
	@echo "installing transformers 4 without torch into $(OLD) (half a minute)"
	$(RUN) -m venv $(OLD)
	$(OLD)/bin/python -m pip install --quiet --disable-pip-version-check 'transformers==4.57.*' sentencepiece protobuf
	@touch $@

# Writes down what stands in .venv, after the suite has passed with it: versions alone, no build tags, no places.
constraints: $(VENV)/.installed-test
	{ echo "# Versions that the test suite has passed with on Python 3.11; made by \`make constraints\`."; \
	  $(RUN) -m pip freeze --exclude-editable | sed -E 's/\+[A-Za-z0-9.]+$$//' | grep -E '^[A-Za-z0-9._-]+==[^ ]+$$'; } > $@.tmp
	mv $@.tmp constraints.txt
	@touch $(VENV)/.installed $(VENV)/.installed-test

clean:
	rm -rf $(VENV) $(OLD) build *.egg-info .pytest_cache .ruff_cache
