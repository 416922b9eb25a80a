# Everything runs in .venv, which is made here and reused: a second run installs nothing unless the files in SETUP changed.
# Other Python: `make demo PYTHON=python3.12`. Some tests only: `make test ARGS="-k gates"`.
PYTHON ?= python3
ARGS   ?=
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := runs/demo
COURSE ?= my-course
RIVAL  ?= runs/nanoGPT/model.py
SETUP  := settings.ini constraints.txt setup.py pyproject.toml
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-long lab chat bench notebooks clean

help: ## show this list
	@echo "make TARGET, where TARGET is one of:"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14

demo: $(VENV)/.runtime ## from raw text to an assistant, on this machine, without network; result in runs/demo
	@echo "==> Training a small GPT from nothing and tuning it to follow instructions (a few minutes on two cores) …"
	$(BIN)/nanogpt speedrun --out $(DEMO)

test: $(VENV)/.dev ## run every test: notebooks, gates, and what notebooks cannot show
	@echo "==> Running all tests (under 20 minutes on two cores) …"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-long: $(VENV)/.dev ## run what takes longer than minutes: the whole demo, many kills, the largest models that fit
	@echo "==> Running the long tests (about half an hour on two cores) …"
	$(BIN)/python -m pytest -m long $(ARGS)

lab: $(VENV)/.runtime ## open your own copy of the lessons in JupyterLab, at the start page
	@mkdir -p $(VENV)/share/jupyter/lab/settings && cp lessons/overrides.json $(VENV)/share/jupyter/lab/settings/overrides.json
	@$(BIN)/nanogpt course start $(COURSE)
	@echo "==> Opening $(COURSE) in JupyterLab (stop with Ctrl-C) …"
	$(BIN)/jupyter lab --ServerApp.root_dir=$(COURSE) --LabApp.default_url=/lab/tree/00_start_here.ipynb $(ARGS)

chat: $(VENV)/.runtime ## open the chat dashboard in the browser, with the models below runs/
	@echo "==> Opening the dashboard (stop with Ctrl-C) …"
	$(BIN)/nanogpt chat $(ARGS)

bench: $(VENV)/.runtime ## measure training, generation and tokenising on this machine, and race nanoGPT
	@echo "==> Measuring training …"
	$(BIN)/nanogpt bench train $(ARGS)
	@echo "==> Measuring generation …"
	$(BIN)/nanogpt bench generate $(ARGS)
	@if $(BIN)/python -c "import transformers, llama_cpp, gguf" 2>/dev/null; \
		then echo "==> Racing transformers and llama.cpp in generation …"; $(BIN)/nanogpt bench generate --shape gpt2 --against transformers,llamacpp; \
		else echo "==> No race in generation: $(PIP) -e '.[bench]' installs transformers and llama.cpp for it"; fi
	@echo "==> Measuring the making of data …"
	$(BIN)/nanogpt bench data
	@test -f $(RIVAL) || { echo "==> Fetching nanoGPT, to race it …"; git clone --quiet --depth 1 https://github.com/karpathy/nanoGPT $(dir $(RIVAL)); } || \
		{ echo "nanoGPT could not be fetched: name a model.py you have with make bench RIVAL=path/to/model.py"; exit 1; }
	@echo "==> Racing nanoGPT: two shapes, five rounds each (about ten minutes on two cores; 15 GB of memory) …"
	$(BIN)/nanogpt bench race --rounds 5 --versus $(RIVAL)

notebooks: $(VENV)/.dev ## write nanogpt/ and lessons/ from nbs/ and clean the notebooks (run it before you commit)
	@echo "==> Exporting nbs/ to nanogpt/, cleaning the notebooks, building lessons/ …"
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/nanogpt course build

clean: ## delete what tools leave behind (runs/ and .venv stay)
	@echo "==> Deleting build folders and caches; runs/ and $(VENV) stay (delete them by hand to start afresh) …"
	rm -rf build dist *.egg-info _proc .pytest_cache .ruff_cache
	find nbs nanogpt tests lessons -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { echo "nanogpt needs Python 3.10 to 3.13, but there is no '$(PYTHON)' here: install one, or name it with make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { echo "nanogpt needs Python 3.10 to 3.13, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1): name another one with make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "'$(PYTHON)' comes without its venv module: install it (on Debian and Ubuntu: apt install python3-venv) and try again"; exit 1; }
	@echo "==> Making $(VENV) with $$($(PYTHON) -V) …"
	@"$(PYTHON)" -m venv $(VENV) || { rm -f $@; exit 1; }

# The stamps are written last, so an install that was interrupted is done again.
$(VENV)/.runtime: $(SETUP) | $(BIN)/python
	@echo "==> Installing nanogpt and what it needs into $(VENV) (some minutes the first time: PyTorch is large) …"
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "==> Adding what the tests need …"
	@$(PIP) -e ".[dev]"
	@touch $@
