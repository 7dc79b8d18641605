.DEFAULT_GOAL := help
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# two files at a time, one core each, in their order: the longest one comes early
TWO_AT_ONCE := -n 2 --dist loadfile --no-loadscope-reorder

help:            ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.installed   ## virtual environment in .venv with everything the tests need

demo: install    ## five minutes on two CPU cores: tokenizer, shards, pretraining, annealing, tuning, and a model to talk to
	$(BIN)/accelerate launch --config_file accelerate_config.yaml train.py recipe=sft

test: install    ## every test that needs no GPU (AQUILA_REAL_DATA=<folder> adds those on real data)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu' $(TWO_AT_ONCE)

test-fast: install  ## the same without those that take more than a few seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu and not slow' $(TWO_AT_ONCE)

chaos: install   ## kill -9 a hundred times at any instant, in all recipes of training, and compare; prints the score
	$(BIN)/python tests/chaos.py 100

faults: install  ## plant faults one by one in a copy, and see which ones the suite catches; prints the score
	$(BIN)/python tests/faults.py

lint: install    ## ruff
	$(BIN)/ruff check .

bench: install   ## the loss of the output head, timed on this CPU at the real shape beside plain torch
	$(BIN)/python kernels/bench/bench.py --device cpu --shape 2k --operations linear_cross_entropy --logits fresh \
	  --supervised 1 0.5 --providers ours eager

gpu: install     ## on a machine with a GPU: fills what is "not measured"; GPU='--part sft pretrain --minutes 5' for some of it
	$(BIN)/python kernels/bench/gpu.py $(GPU)

verify-hub: install  ## with network and access: BAAI's published checkpoints load here, and score as their card says
	$(BIN)/python -m aquila_sft.evaluation.verify_hub

clean:           ## remove caches and the virtual environment; runs under outputs/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info

.PHONY: help install demo test test-fast chaos faults lint bench gpu verify-hub clean
