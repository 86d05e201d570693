# Every target makes the environment it needs; all that is wanted on PATH is a Python >= 3.11.
PYTHON ?= python3
KERNELS_JAX := 0.11.2
# Asked for only by test-kernels: the first Python that this jax runs on.
KERNELS_PYTHON ?= $(shell for p in $(PYTHON) python3.13 python3.12 \
	$${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[23]*/bin/python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
FAST_COMPILE = XLA_FLAGS="$$($(1) tests/fast_compile.py) $(XLA_FLAGS)" $(1)
PIP := -m pip --disable-pip-version-check install --quiet

.PHONY: demo test test-slow test-kernels run-test-kernels lint clean

demo: .venv/.installed  ## generate text with the bundled model
	.venv/bin/jax-mla demo

test: .venv/.installed-test  ## the test suite
	$(call FAST_COMPILE,.venv/bin/python) -m pytest -q -m "not slow" -n 2 --dist worksteal

test-slow: .venv/.installed-test  ## what `test` leaves out; golden logits and examples as XLA compiles for users
	$(call FAST_COMPILE,.venv/bin/python) -m pytest -q -m slow -n 2 --dist worksteal
	.venv/bin/python -m pytest -q tests/jax_mla/test_golden.py tests/examples -n 2 --dist worksteal

test-kernels:  ## the same suite on the newer jax, with kernels simulated and compiled for sm_90a
	@$(if $(KERNELS_PYTHON),$(MAKE) --no-print-directory run-test-kernels,\
		echo "make test-kernels: nothing ran, no Python >= 3.12 was found (jax $(KERNELS_JAX) needs one)")

run-test-kernels: .venv-kernels/.installed
	$(call FAST_COMPILE,.venv-kernels/bin/python) -m pytest -q -m "not slow" -n 2 --dist worksteal

lint: .venv/.installed-dev  ## format, lint, types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright --pythonpath .venv/bin/python

clean:  ## remove the environments
	rm -rf .venv .venv-kernels

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(f"needs Python >= 3.11, found {sys.version.split()[0]}: make PYTHON=/path/to/python" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) --editable .
	touch $@

.venv/.installed-%: .venv/.installed
	.venv/bin/python $(PIP) --editable '.[$*]'
	touch $@

.venv-kernels/.installed: pyproject.toml
	$(KERNELS_PYTHON) -m venv .venv-kernels
	.venv-kernels/bin/python $(PIP) --editable '.[test,aot]' \
		jax==$(KERNELS_JAX) jax-cuda13-plugin==$(KERNELS_JAX) jax-cuda13-pjrt==$(KERNELS_JAX)
	touch $@
