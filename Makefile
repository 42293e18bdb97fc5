# Every target sets itself up: `make demo` and `make test` need only make and Python 3.11 or 3.12.
# PYTHON=/path/to/python chooses the interpreter; pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are respected.

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
PYTHON ?=

.PHONY: demo setup test test-long lint export dist wheel docs test-toolchains clean

demo: $(STAMP)
	$(PY) -m examples.demo --output_dir demo_output

setup: $(STAMP)  # .venv, with the command `weakseg`

# glibc hands freed memory back and takes it again page by page, which some virtual machines make several times as slow
test test-long: export MALLOC_MMAP_MAX_ = 0
test test-long: export MALLOC_TRIM_THRESHOLD_ = 8000000000
test: lint
	$(PY) -m pytest -q

test-long: export FUZZ_EXAMPLES = 2000
test-long: $(STAMP)  # 20 kills of each kind of run, 2,000 examples of each kind of input
	$(PY) -m pytest -q -m "long or fuzz"

lint: $(STAMP)
	$(PY) -m ruff check .
	$(VENV)/bin/lint-imports --no-logo --no-cache

export: $(STAMP)  # TorchScript and ONNX; the next `make dist` takes them along
	$(PY) -m packing.export bundles/brats_flair
	$(PY) -m packing.export bundles/chaos_kidney

dist: $(STAMP)  # each bundle as a folder and a zip that stand alone
	$(PY) -m packing.pack

wheel: $(STAMP)  # dist/*.whl: the command `weakseg` with the bundles
	$(PY) -m build

test-toolchains: $(STAMP)  # real hosts, each in an environment of its own under .toolchains: gigabytes and minutes, once
	$(PY) -m pytest tests/toolchains -s -rA

# every file that a page links to lies beside it; .toolchains/docs is an environment of its own
docs: $(STAMP)  # site/: the pages as a site; broken links are errors
	test -x .toolchains/docs/bin/mkdocs || $(PY) -m venv .toolchains/docs
	.toolchains/docs/bin/python -m pip install --quiet --requirement docs/requirements.txt
	rm -rf build/docs && mkdir -p build/docs
	git ls-files -z '*.md' '*.png' '*.txt' '*.ipynb' '*.yaml' '*.cff' LICENSE ':!tests' | xargs -0 tar -cf - | tar -xf - -C build/docs
	.toolchains/docs/bin/mkdocs build --strict

clean:  # leaves .venv, .toolchains and your runs alone
	rm -rf demo_output tour_output build dist site *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './.toolchains/*' -prune -exec rm -rf {} +

# A name on PATH may be a shim that fails, or a Python without venv, so each candidate has to run.
$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  found=; for python in $(if $(PYTHON),"$(PYTHON)",python3.12 python3.11 python3 python); do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	        >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "No working Python 3.11 or 3.12 with venv found (tried: $(or $(PYTHON),python3.12 python3.11 python3 python))." >&2; \
	    echo "Install one (on Debian and Ubuntu with its -venv package), or name it: make PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "Setting up $(VENV) with $$("$$found" --version)"; \
	  "$$found" -m venv $(VENV); \
	fi
	$(PY) -m pip install -r requirements-dev.txt
	$(PY) -m pip install --no-deps --editable .
	@touch $@
