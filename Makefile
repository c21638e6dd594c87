PYTHON ?= python3
# auto, forks or openmmlab
STACK ?= auto
# A PyTorch version such as 2.6.0; empty: the installed one, otherwise the tested one
TORCH ?=
# compiled: compile mmcv's operators, which needs a compiler; empty: this package's in PyTorch
OPS ?=
# Not empty: no mmdet
SEGMENTATION_ONLY ?=
# pytest-xdist workers
WORKERS ?= auto
# Tests that share a training run go to one worker.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadgroup
VENV := .venv
# Written when the setup is complete; it runs again when the versions change.
READY := $(VENV)/.ready-$(STACK)$(TORCH:%=-%)$(OPS:%=-%)$(SEGMENTATION_ONLY:%=-seg)
# Written when what the tests need is there, too.
TESTS := $(READY)-tests

.PHONY: help demo test test-fast lint clean

help:  ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' Makefile | expand -t 12

demo: $(READY)  ## Train and evaluate segmentation and detection on generated images.
	$(VENV)/bin/python tools/demo.py

test: $(VENV)/.triton  ## Run all tests.
	$(PYTEST)

test-fast: $(VENV)/.triton  ## Run the tests that are not marked slow.
	$(PYTEST) -m "not slow"

lint: $(TESTS)  ## Check style and types.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy convnext_mm convnext_mm_command.py

clean:  ## Remove the environment, the builds, the demo's images and its results.
	rm -rf $(VENV) build dist *.egg-info data/demo work_dirs/demo

# 190 MB, for tests only: CPU builds of PyTorch come without Triton, whose interpreter runs the
# kernels in tests.
$(VENV)/.triton: $(TESTS)
	$(VENV)/bin/python -c 'import triton' 2> /dev/null || \
		$(VENV)/bin/python -m pip install -q --no-build-isolation -e '.[interpreter]'
	@touch $@

INSTALL = $(PYTHON) tools/install.py --stack $(STACK) $(TORCH:%=--torch %) $(OPS:%=--ops %) \
	$(SEGMENTATION_ONLY:%=--segmentation-only)

$(READY): setup.py tools/install.py
	$(INSTALL)
	@rm -f $(VENV)/.ready-*
	@touch $@

$(TESTS): setup.py tools/install.py
	$(INSTALL) --tests
	@rm -f $(VENV)/.ready-*
	@touch $(READY) $@
