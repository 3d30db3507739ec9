# Every command of the project. `make` alone lists them.
# The first one that needs it sets up .venv from requirements/*.lock; after that nothing is installed
# until a lock file changes.

.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory
export PIP_DISABLE_PIP_VERSION_CHECK := 1

MODEL ?= demo
TP ?= 1
PROFILE ?=
PRECISION ?=
KV_CACHE ?=
CALIBRATION ?=
IMAGE ?=
PROMPT ?=
HTTP_PORT ?=
GRPC_PORT ?=
METRICS_PORT ?=
GATEWAY_PORT ?=
POSTPROCESSING_BATCH ?=
API_KEYS ?=
GPU ?= A100-80G
BATCH ?=
MAX_TILES ?=
IMAGES ?=
MAX_SEQ_LEN ?=
EXAMPLES ?=
JSONL ?=
OUTPUT ?=
COMPARE ?=
SERVER ?=
TARGET ?=
CONCURRENCY ?=
MIX ?=
TILES ?=
OPTIONS ?=
A ?=
B ?=
EXAMPLE ?=
MINUTES ?=
# The comparisons with transformers need torch. The registry's build brings several GB of CUDA
# packages, so it is left out, and they are skipped: point pip at CPU wheels with
# PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS, or set ALLOW_CUDA_TORCH=1.
ALLOW_CUDA_TORCH ?=

# Recipes read these from the environment, exactly as given: spaces, quotes and dollars survive.
TEXTS := MODEL TP PROFILE PRECISION KV_CACHE CALIBRATION IMAGE PROMPT HTTP_PORT GRPC_PORT METRICS_PORT GATEWAY_PORT POSTPROCESSING_BATCH API_KEYS GPU BATCH MAX_TILES IMAGES MAX_SEQ_LEN EXAMPLES JSONL OUTPUT COMPARE SERVER TARGET CONCURRENCY MIX TILES OPTIONS A B EXAMPLE MINUTES
$(foreach text,$(TEXTS),$(eval override $(text) := $$(value $(text))))
export $(TEXTS)

# The first Python 3.10-3.12 on PATH; another one: make PYTHON=/path/to/python3.11 ...
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	"$$p" -c '$(SUPPORTED)' 2>/dev/null && echo "$$p" && break; done)

VENV := .venv
RUN := $(VENV)/bin/python
# A stamp is touched as the last step of its recipe: a killed installation is done again.
CREATED := $(VENV)/created.stamp
RUNTIME := $(VENV)/runtime.stamp
GATEWAY := $(VENV)/gateway.stamp
BENCH := $(VENV)/bench.stamp
TEST := $(VENV)/test.stamp

##@ Use

.PHONY: demo
demo: $(RUNTIME) ## Answer a question about a picture through a real Triton server
	@$(RUN) -m clients.demo

.PHONY: engines
engines: $(RUNTIME) ## Convert MODEL (a name or a directory) for TP GPUs [PROFILE=cpu|gpu] [PRECISION= KV_CACHE= CALIBRATION=dir]
	@$(RUN) -m build.engines --model="$$MODEL" --tp-size="$$TP" $(if $(PROFILE),--profile="$$PROFILE") $(if $(PRECISION),--precision="$$PRECISION") $(if $(KV_CACHE),--kv-cache="$$KV_CACHE") $(if $(CALIBRATION),--calibration="$$CALIBRATION")

.PHONY: plan
plan: $(RUNTIME) ## Does MODEL fit? Memory, flags and estimates: GPU=A100-80G TP=2 [BATCH= MAX_TILES= IMAGES= MAX_SEQ_LEN= PRECISION=]
	@$(RUN) -m build.plan --model="$$MODEL" --gpu="$$GPU" --tp-size="$$TP" $(if $(BATCH),--batch-size="$$BATCH") $(if $(MAX_TILES),--max-tiles="$$MAX_TILES") $(if $(IMAGES),--images="$$IMAGES") $(if $(MAX_SEQ_LEN),--max-seq-len="$$MAX_SEQ_LEN") $(if $(PRECISION),--precision="$$PRECISION")

.PHONY: serve
serve: $(RUNTIME) ## Serve MODEL until Ctrl-C [TP=] [PROFILE=] [PRECISION= KV_CACHE=] [HTTP_PORT= GRPC_PORT= METRICS_PORT=] [POSTPROCESSING_BATCH=64]
	@exec $(RUN) -m build.serve --model="$$MODEL" --tp-size="$$TP" $(if $(PROFILE),--profile="$$PROFILE") $(if $(PRECISION),--precision="$$PRECISION") $(if $(KV_CACHE),--kv-cache="$$KV_CACHE") $(if $(HTTP_PORT),--http-port="$$HTTP_PORT") $(if $(GRPC_PORT),--grpc-port="$$GRPC_PORT") $(if $(METRICS_PORT),--metrics-port="$$METRICS_PORT") $(if $(POSTPROCESSING_BATCH),--postprocessing-batch="$$POSTPROCESSING_BATCH")

.PHONY: gateway
gateway: $(GATEWAY) ## OpenAI-compatible endpoint of the running service [GRPC_PORT= GATEWAY_PORT=9000 API_KEYS=file]
	@exec $(RUN) -m gateway.serve $(if $(GRPC_PORT),--grpc-port="$$GRPC_PORT") $(if $(GATEWAY_PORT),--port="$$GATEWAY_PORT") $(if $(API_KEYS),--api-keys="$$API_KEYS")

.PHONY: chat
chat: $(RUNTIME) ## Ask the served MODEL: PROMPT="..." [IMAGE=file] [GRPC_PORT=]
	@exec $(RUN) -m clients.chat --model="$$MODEL" --prompt="$$PROMPT" $(if $(IMAGE),--image="$$IMAGE") $(if $(GRPC_PORT),--grpc-port="$$GRPC_PORT")

.PHONY: examples
examples: $(RUNTIME) ## Ask the running service the model card's examples [EXAMPLE=name] [HTTP_PORT= GRPC_PORT=]
	@exec $(RUN) -m clients.examples $(if $(HTTP_PORT),--http-port="$$HTTP_PORT") $(if $(GRPC_PORT),--grpc-port="$$GRPC_PORT") $(if $(EXAMPLE),"$$EXAMPLE")

.PHONY: export-llm
export-llm: $(RUNTIME) ## Write the language model of MODEL as a plain directory for transformers
	@$(RUN) -m build.hf_llm --model="$$MODEL"

##@ Develop

.PHONY: test
test: lint ## Everything that CI runs: format, lint, types, all tests
	@$(RUN) -m pytest

.PHONY: lint
lint: $(TEST) ## Check format, lint and types
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

.PHONY: format
format: $(TEST) ## Format the code and repair what ruff can
	@$(RUN) -m ruff format .
	@$(RUN) -m ruff check --fix .

.PHONY: check-engines
check-engines: $(TEST) ## Compile the vision graph of MODEL with TensorRT for RTX, without a GPU
	@$(RUN) -m build.check_engines --model="$$MODEL"

.PHONY: check-family
check-family: $(TEST) ## Export, compile and convert all seven sizes at true width [half an hour, 27 GB of disk; OPTIONS="-k 26B": one]
	@$(RUN) -m pytest tests/family -m "family or not family" --durations=0 $$OPTIONS

.PHONY: verify
verify: $(TEST) ## Compare what MODEL was built into with its checkpoint in PyTorch [TP=] [PROFILE=] [PRECISION=]
	@$(RUN) -m build.verify --model="$$MODEL" --tp-size="$$TP" $(if $(PROFILE),--profile="$$PROFILE") $(if $(PRECISION),--precision="$$PRECISION")

.PHONY: render-configs
render-configs: $(RUNTIME) ## Write model_repository/*/config.pbtxt from the tensor contract
	@$(RUN) -m build.render_configs

.PHONY: accuracy
accuracy: $(RUNTIME) ## How many answers of MODEL are right [EXAMPLES= | JSONL=] [OUTPUT=] [COMPARE=] [SERVER=host:port]
	@$(RUN) -m benchmarks.accuracy --model="$$MODEL" --tp-size="$$TP" $(if $(PRECISION),--precision="$$PRECISION") $(if $(EXAMPLES),--examples="$$EXAMPLES") $(if $(JSONL),--jsonl="$$JSONL") $(if $(OUTPUT),--output="$$OUTPUT") $(if $(COMPARE),--compare="$$COMPARE") $(if $(SERVER),--server="$$SERVER")

.PHONY: bench
bench: $(BENCH) ## Load MODEL or TARGET=grpc://...|http://.../v1, and report [CONCURRENCY="1 4"] [MIX="1280x720 text"] [OUTPUT=] [OPTIONS=]
	@$(RUN) -m benchmarks.bench --model="$$MODEL" --tp-size="$$TP" $(if $(PRECISION),--precision="$$PRECISION") $(if $(TARGET),--target="$$TARGET") $(if $(CONCURRENCY),--concurrency $$CONCURRENCY) $(if $(MIX),--mix $$MIX) $(if $(OUTPUT),--output="$$OUTPUT") $$OPTIONS

.PHONY: bench-compare
bench-compare: $(BENCH) ## Two runs of `make bench` side by side: A=folder B=folder
	@$(RUN) -m benchmarks.bench_compare --a="$$A" --b="$$B"

.PHONY: bench-pipeline
bench-pipeline: $(BENCH) ## What the pipeline itself costs, around engines that answer at once
	@$(RUN) -m benchmarks.pipeline_cost --model="$$MODEL" $$OPTIONS

.PHONY: bench-gateway
bench-gateway: $(BENCH) ## What the OpenAI-compatible endpoint adds to gRPC, around engines that answer at once
	@$(RUN) -m benchmarks.gateway_cost --model="$$MODEL" $$OPTIONS

.PHONY: bench-preprocessing
bench-preprocessing: $(TEST) ## Preprocessing beside the model card's code and transformers' processor
	@$(RUN) -m benchmarks.preprocessing_time $$OPTIONS

.PHONY: bench-engines
bench-engines: $(TEST) ## The CPU engines of MODEL beside PyTorch and transformers
	@$(RUN) -m benchmarks.engine_time --model="$$MODEL" $$OPTIONS

.PHONY: bench-engine-only
bench-engine-only: $(RUNTIME) ## The engines of MODEL alone beside the planner's floors [TP=] [PROFILE=] [PRECISION= KV_CACHE=] [OPTIONS=]
	@exec $(RUN) -m benchmarks.engine_only --model="$$MODEL" --tp-size="$$TP" $(if $(PROFILE),--profile="$$PROFILE") $(if $(PRECISION),--precision="$$PRECISION") $(if $(KV_CACHE),--kv-cache="$$KV_CACHE") $$OPTIONS

.PHONY: bench-grid
bench-grid: $(RUNTIME) ## Latency of the service by batch, tiles and TP beside the floors [SERVER=host:port] [BATCH="1 8" TILES="1 13"] [OUTPUT=] [OPTIONS=]
	@$(RUN) -m benchmarks.latency_grid --model="$$MODEL" --tp-size="$$TP" $(if $(PRECISION),--precision="$$PRECISION") $(if $(SERVER),--server="$$SERVER") $(if $(BATCH),--batch $$BATCH) $(if $(TILES),--tiles $$TILES) $(if $(OUTPUT),--output="$$OUTPUT") $$OPTIONS

.PHONY: bench-perf-analyzer
bench-perf-analyzer: $(BENCH) ## NVIDIA's perf_analyzer and our generator against a running server [SERVER=host:port] [MIX=]
	@$(RUN) -m benchmarks.perf_analyzer $(if $(SERVER),--server="$$SERVER") $(if $(MIX),--mix $$MIX) $$OPTIONS

.PHONY: bench-aiperf
bench-aiperf: $(BENCH) ## NVIDIA's aiperf and our generator against a running gateway [TARGET=http://.../v1] [MIX=] [1.2 GB more]
	@$(RUN) -m benchmarks.aiperf --model="$$MODEL" $(if $(TARGET),--url="$$TARGET") $(if $(MIX),--mix $$MIX) $$OPTIONS

.PHONY: bench-conversion
bench-conversion: $(TEST) ## Time and peak memory of the conversion, beside copying the files and loading them with transformers
	@$(RUN) -m benchmarks.conversion_memory
	@$(RUN) -m benchmarks.conversion_time

.PHONY: bench-precision
bench-precision: $(RUNTIME) ## Compare bf16, int8 and int4 weights of MODEL on the CPU engine
	@$(RUN) -m benchmarks.precision_agreement --model="$$MODEL"

.PHONY: soak
soak: $(RUNTIME) ## 64 mixed streams of MODEL for 10 minutes: errors, answers that differ, memory [MINUTES=] [SERVER=host:port]
	@$(RUN) -m benchmarks.soak --model="$$MODEL" $(if $(MINUTES),--minutes="$$MINUTES") $(if $(SERVER),--server="$$SERVER")

##@ Demo model

.PHONY: train-demo
train-demo: $(TEST) ## Train the demo model from nothing, or go on with it [two cores, an hour and a half; Ctrl-C saves]
	@$(RUN) -m demo.train

.PHONY: export-demo
export-demo: $(TEST) ## Write what `make train-demo` has so far as demo/checkpoint, with its curve
	@$(RUN) -m demo.export --directory=demo/checkpoint
	@$(RUN) -m demo.curve --picture=demo/curve.png

.PHONY: bench-prefix
bench-prefix: $(RUNTIME) ## Time to first token of a second turn against the first of MODEL [TP=] [SERVER=host:port]
	@$(RUN) -m benchmarks.prefix_reuse --model="$$MODEL" --tp-size="$$TP" $(if $(SERVER),--server="$$SERVER")

##@ Set up

.PHONY: env
env: $(RUNTIME) ## Set up .venv with what the demo and the server need

.PHONY: test-env
test-env: $(TEST) ## Set up .venv with what the tests need as well

.PHONY: lock
lock: $(RUNTIME) ## Write requirements/*.lock from pyproject.toml
	@$(RUN) -m pip install --quiet "uv>=0.9"
	@$(RUN) -m build.lock

.PHONY: clean
clean: ## Remove .venv, artifacts and caches
	@rm -rf $(VENV) artifacts dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help
help: ## List these commands
	@awk -F ':.*## ' '/^##@/ {print "\n" substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile
	@echo; echo "Defaults: MODEL=demo TP=1. Example: make chat MODEL=demo IMAGE=photo.jpg PROMPT=\"What is this?\""

$(CREATED):
	@"$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { echo "Python 3.10, 3.11 or 3.12 is needed, and $(if $(PYTHON),$(PYTHON) is not one,none is on PATH). Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "Setting up $(VENV) ..."
	@"$(PYTHON)" -m build.virtual_environment $(VENV)
	@touch $@

$(RUNTIME): requirements/runtime.lock | $(CREATED)
	@echo "Installing what the server needs (0.7 GB on disk) ..."
	@$(RUN) -m pip install --quiet --requirement requirements/runtime.lock
	@$(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@$(RUN) -m build.libpython
	@touch $@

$(GATEWAY): requirements/gateway.lock $(RUNTIME)
	@$(RUN) -m pip install --quiet --requirement requirements/gateway.lock
	@touch $@

$(BENCH): requirements/bench.lock $(RUNTIME)
	@$(RUN) -m pip install --quiet --requirement requirements/bench.lock
	@touch $@

$(TEST): requirements/test.lock requirements/torch.lock $(RUNTIME)
	@echo "Installing what the tests need (1.4 GB more) ..."
	@$(RUN) -m build.install_torch $(if $(ALLOW_CUDA_TORCH),--allow-cuda)
	@$(RUN) -m pip install --quiet --requirement requirements/test.lock
	@touch $@
