# Two commands: `make demo` (the whole recipe on a toy world, CPU) and `make test`. For more time:
# `make reproduce` (the controlled study), `make signals` (five signals from one stage 1), `make real`
# (data nobody here drew), `make kill` (crashes), `make bench` (speed and memory), `make gpu` (all a
# GPU can show), `make look` (the run's page in a browser).
PYTHON ?= python3
PY := .venv/bin/python
TOY := --encoder toy-vit --llm toy-lm --data data/toy
SCORE := --llm toy-lm --data data/toy
RUN := runs/toy-vit__toy-lm
EYES := toy-vit $(RUN)/sft/encoder $(RUN)/dpo/encoder

.PHONY: demo test compat real reproduce signals bench gpu kill look clean

.venv/done: requirements-dev.txt requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	    "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + \
	    "; try: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

data/toy: | .venv/done
	$(PY) -m toy data/toy

# The recipe, in the order of the paper. Every line continues where it was interrupted.
demo: .venv/done data/toy
	$(PY) pretrain.py  $(TOY)
	$(PY) train_sft.py $(TOY)
	$(PY) train_dpo.py $(TOY)
	$(PY) extract.py --run-dir $(RUN) --stage sft
	$(PY) extract.py --run-dir $(RUN) --stage dpo
	$(PY) repair_eval.py --mllm $(RUN)/pretrain/final $(SCORE)
	$(PY) repair_eval.py --mllm $(RUN)/pretrain/final $(SCORE) --wrong-image
	$(PY) repair_eval.py --mllm $(RUN)/sft/final $(SCORE)
	$(PY) repair_eval.py --mllm $(RUN)/dpo/final $(SCORE)
	$(PY) repair_eval.py $(TOY)
	$(PY) repair_eval.py --encoder $(RUN)/sft/encoder $(SCORE)
	$(PY) repair_eval.py --encoder $(RUN)/dpo/encoder $(SCORE)
	$(PY) probe_linear.py --encoder $(EYES) --data data/toy/imagenet
	$(PY) probe_seg.py --encoder $(EYES) --data data/toy/ade20k
	$(PY) probe_align.py --encoder $(EYES) --llm toy-lm --data data/toy/align
	$(PY) gradcam.py --run-dir $(RUN) --num-samples 120
	$(PY) gradcam.py --run-dir $(RUN) --path
	@echo; echo "1. Stage 1, and the same model shown the wrong images"
	@$(PY) repair_eval.py --compare $(RUN)/pretrain/bench $(RUN)/pretrain/bench-wrong-image
	@echo; echo "2. The trained models (pretrain = stage 1)"
	@$(PY) repair_eval.py --compare $(RUN)/pretrain $(RUN)/sft $(RUN)/dpo
	@echo; echo "3. The encoders, frozen, each re-paired with a new LLM (toy-vit = original)"
	@$(PY) repair_eval.py --compare $(RUN)/repair/toy-vit $(RUN)/repair/sft $(RUN)/repair/dpo
	@echo; echo "4. All instruments"
	@$(PY) -m tools.evidence --run-dir $(RUN)
	@echo; echo "All of it to look at"
	@$(PY) -m tools.page $(RUN)

# The same chain on data nobody here drew: easy-VQA, 5,000 images and 48k questions (MIT).
REAL := --encoder toy-vit --llm toy-lm --data data/real
REALRUN := runs/easy-vqa
data/real: | .venv/done
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps easy-vqa==1.0 -d data/easy-vqa
	$(PY) benchmarks/easy_vqa.py data/easy-vqa/easy_vqa-1.0-py3-none-any.whl data/real

real: .venv/done data/real
	$(PY) pretrain.py  $(REAL) --run-dir $(REALRUN)
	$(PY) train_sft.py --run-dir $(REALRUN)
	$(PY) train_dpo.py --run-dir $(REALRUN)
	$(PY) extract.py --run-dir $(REALRUN) --stage sft
	$(PY) extract.py --run-dir $(REALRUN) --stage dpo
	for stage in pretrain sft dpo; do \
	    $(PY) repair_eval.py --mllm $(REALRUN)/$$stage/final --llm toy-lm --data data/real || exit 1; done
	for encoder in toy-vit $(REALRUN)/sft/encoder $(REALRUN)/dpo/encoder; do \
	    $(PY) repair_eval.py --run-dir $(REALRUN) --encoder $$encoder --llm toy-lm --data data/real || exit 1; done
	@echo; echo "easy-VQA's own test split: the trained models, then the re-paired encoders"
	@$(PY) repair_eval.py --compare $(REALRUN)/pretrain $(REALRUN)/sft $(REALRUN)/dpo
	@$(PY) repair_eval.py --compare $(REALRUN)/repair/toy-vit $(REALRUN)/repair/sft $(REALRUN)/repair/dpo

test: .venv/done
	$(PY) -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder --ignore tests/test_opens.py tests

# Every family of encoders trained for a moment; what comes out opened here and by transformers 4.
compat: .venv/done .venv-compat/done
	$(PY) -m pytest -q -n 2 tests/test_opens.py
	.venv-compat/bin/python tests/compat.py .pytest_cache/opens
	$(PY) -m pytest -q tests/test_opens.py -k transformers_4

.venv-compat/done: requirements-compat.txt
	$(PYTHON) -m venv .venv-compat
	.venv-compat/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# Every way to end, and every stage killed at every named moment and at random ones; then the tests
# that are too slow for `make test`. An hour.
kill: .venv/done
	PIVOT_KILLS=long $(PY) -m pytest -v -n 3 --dist worksteal tests/test_ends.py tests/test_survive.py
	PIVOT_KILLS=long $(PY) -m pytest -v -n 2 -m slow tests

# The controlled study: hours, resumable; SEEDS=1 QUICK=1 says in minutes whether it all works;
# MINUTES=140 is a slice of it, PARTS="lr vqa" the parts to run. The plan: results/README.md.
SEEDS ?= 5
reproduce: .venv/done
	$(PY) -m study --seeds $(SEEDS) $(if $(QUICK),--quick) $(if $(PARTS),--parts $(PARTS)) \
	    $(if $(MINUTES),--minutes $(MINUTES))
	$(if $(QUICK),,$(PY) -m study.report --against runs/study/results)

# SFT, DPO, MPO, GRPO and PPO from one stage 1, on the same prompts; the same variables. The plan:
# study/signals.md.
signals: .venv/done
	$(PY) -m study.signals --seeds $(SEEDS) $(if $(QUICK),--quick) \
	    $(if $(PARTS),--parts $(PARTS)) $(if $(MINUTES),--minutes $(MINUTES))

# Figures of speed and memory, on an idle machine; `make bench BENCH=--quick` checks that they run.
BENCHPY := .venv-bench/bin/python
.venv-bench/done: requirements-bench.txt requirements.txt
	$(PYTHON) -m venv .venv-bench
	$(BENCHPY) -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch $@

OLDTRL := .venv-bench/trl-0.24.0-py3-none-any.whl
$(OLDTRL): .venv-bench/done
	$(BENCHPY) -m pip download --quiet --disable-pip-version-check --no-deps --dest $(@D) trl==0.24.0

bench: .venv-bench/done $(OLDTRL) data/toy
	$(BENCHPY) benchmarks/flops.py $(BENCH)
	$(BENCHPY) benchmarks/dpo_vs_trl.py $(BENCH)
	$(BENCHPY) benchmarks/sft_vs_trainer.py $(BENCH)
	$(BENCHPY) benchmarks/grpo_vs_trl.py $(BENCH)
	$(BENCHPY) benchmarks/signals_vs_trl.py $(BENCH)
	$(BENCHPY) benchmarks/savings.py $(BENCH)
	$(BENCHPY) benchmarks/scaling.py $(BENCH)
	$(BENCHPY) benchmarks/generate_vs_transformers.py $(BENCH)
	$(BENCHPY) benchmarks/logistic_vs_sklearn.py $(BENCH)
	$(BENCHPY) benchmarks/checkpoint.py data/toy
	$(BENCHPY) benchmarks/indexing.py --records 100000 $(BENCH)
	$(BENCHPY) benchmarks/packs.py $(BENCH)
	$(BENCHPY) benchmarks/decode.py $(BENCH)

# On a machine with a GPU: is it right, how fast, how small; nine minutes. No environment is made:
# PYTHON as it stands. `make gpu GPU="--parts speed"` is a part; GPU=--quick the CPU path.
gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU)

# The page of the demo's run, and one of hostile names, in headless Chromium, which must be there
# already: light and dark, narrow and wide, without JavaScript; screenshots in runs/look.
.venv-look/done: requirements-look.txt
	$(PYTHON) -m venv .venv-look
	.venv-look/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

look: .venv/done .venv-look/done
	$(PY) -m tools.page $(RUN)
	rm -rf runs/look
	$(PY) tests/made_run.py runs/look/made
	.venv-look/bin/python tests/look.py runs/look $(RUN)/page.html "runs/look/made/hostile <b>/page.html"

clean:
	rm -rf .venv .venv-bench .venv-compat .venv-look data/toy runs
