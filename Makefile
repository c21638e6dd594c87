PYTHON ?= python3
STACK ?= auto
VENV := .venv
# Written when the set-up is complete; a change of the versions sets up what changed.
READY := $(VENV)/.ready-$(STACK)

.PHONY: demo test lint clean

demo: $(READY)  ## Train and evaluate segmentation and detection on drawn pictures.
	$(VENV)/bin/python tools/demo.py

test: $(VENV)/.triton  ## Run the tests.
	$(VENV)/bin/python -m pytest

lint: $(READY)  ## Check the style.
	$(VENV)/bin/ruff check .

clean:  ## Remove the environment, the demo's pictures and its results.
	rm -rf $(VENV) data/demo work_dirs/demo

# Only for tests, 190 MB: a PyTorch for CPUs has no Triton, whose interpreter runs the kernels.
$(VENV)/.triton: $(READY)
	$(VENV)/bin/python -c 'import triton' 2> /dev/null || \
		$(VENV)/bin/python -m pip install -q --no-build-isolation -e '.[interpreter]'
	@touch $@

$(READY): setup.py tools/install.py
	$(PYTHON) tools/install.py --stack $(STACK)
	@rm -f $(VENV)/.ready-*
	@touch $@
