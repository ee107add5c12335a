# Each command makes the environment it needs. PYTHON=python3.12 make demo chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

demo: $(VENV)/demo.stamp
	$(BIN)/zolightning demo $(ARGS)

# One process a core and one more, as some wait for servers; a file's tests stay together, so that what they share is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

# Of products over recipes, modules and the like ten cases each; `make test ARGS="--cases 1000"` looks at all.
test: lint
	$(PYTEST) --cases 10 $(ARGS)

test-fast: $(VENV)/dev.stamp
	$(PYTEST) -m "not slow and not integration" --cases 2 $(ARGS)

test-slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q -m slow $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tables in the pages, from the raw results beside them; a test fails where they differ.
tables: $(VENV)/dev.stamp
	$(BIN)/python tests/tables.py

# The API from the docstrings. pdoc cannot resolve some types of NamedTuples and of packages that are not installed, and shows
# them as written; any other warning is an error.
API := zolightning $(patsubst zolightning/%/__init__.py,zolightning.%,$(wildcard zolightning/*/__init__.py))

docs: $(VENV)/dev.stamp
	$(BIN)/python -W error::UserWarning -W "ignore:Error parsing type annotation" -W "ignore:Failed to run TYPE_CHECKING" \
	    -W "ignore:Cannot determine where" -m pdoc -d google --math -o build/docs $(API)

$(VENV)/demo.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# llama.cpp without compiling it: the binding only, and built libraries of its release (Linux on x86-64; needs npm).
LLAMA := $(VENV)/llama
llama: $(VENV)/dev.stamp
	rm -rf $(LLAMA)
	mkdir -p $(LLAMA)
	$(BIN)/python -m pip install -q -c constraints.txt -C wheel.cmake=false llama-cpp-python==0.3.34
	cd $(LLAMA) && npm pack --silent @node-llama-cpp/linux-x64@3.19.1 && tar xzf *.tgz --strip-components=3 package/bins/linux-x64
	cd $(LLAMA) && rm *.tgz && ln -s libllama.b10068.so libllama.so
	LLAMA_CPP_LIB_PATH=$(CURDIR)/$(LLAMA) $(BIN)/python -c "from zolightning.blackbox.llamacpp import library; library()"

# Flower in an environment of its own, on top of the other: it moves packages down that the dashboard needs.
FLOWER := $(VENV)/flower
SITE = $$($(1) -c "import sysconfig; print(sysconfig.get_path('purelib'))")
flower: $(FLOWER)/stamp
$(FLOWER)/stamp: $(VENV)/dev.stamp
	$(PYTHON) -m venv $(FLOWER)
	echo $(call SITE,$(BIN)/python) > $(call SITE,$(FLOWER)/bin/python)/below.pth
	echo $(CURDIR) > $(call SITE,$(FLOWER)/bin/python)/project.pth
	$(FLOWER)/bin/python -m pip install -q "flwr==1.42.0"
	touch $@

test-flower: $(FLOWER)/stamp
	OMP_NUM_THREADS=1 FLWR_TELEMETRY_ENABLED=0 $(FLOWER)/bin/python -m pytest -q -p no:xdist tests/test_federated_flower.py $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

.PHONY: demo docs flower tables llama test test-flower test-fast test-slow lint clean
