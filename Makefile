# `make test` and `make demo` do all the set-up from nothing.
# `make test VENV= PY=python3` uses that Python as it is and installs nothing.
PY ?= python3
VENV ?= .venv
DETKIT_SHARED ?= ../shared
export MAX_JOBS ?= 2
TEST_JOBS ?= 2
export PATH := $(if $(VENV),$(abspath $(VENV))/bin:)$(PATH)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
ifneq ($(wildcard .peer/torchvision_cpu.py),)
export DETKIT_PEER ?= $(CURDIR)/.peer
endif

RUN := $(if $(VENV),$(VENV)/bin/python,$(PY))
PIP := $(RUN) -m pip install -q -c constraints.txt
DEPS := $(if $(VENV),$(VENV)/.deps)
CSRC := $(shell find csrc -type f)
CMAKE = cmake -G Ninja -DPython3_EXECUTABLE=$(abspath $(shell command -v $(RUN)))

.PHONY: setup build test test-gpu kernels peer carry gpu gpu-rehearsal bench fmt lint types check ctest sanitize demo docs nightly clean FORCE

setup: $(DEPS)
build: build/.ext

# torch first and by its pin: an open requirement would fetch another, CUDA build of it.
$(VENV)/.deps: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PY) -m venv $(VENV)
	$(PIP) torch "setuptools>=77" ninja pybind11
	DETKIT_SKIP_EXT=1 $(PIP) --no-build-isolation -C editable_mode=compat -e ".[dev,plots,onnx,docs,fast-eval]"
	touch $@

# What the built files depend on besides the sources; written anew only when it changes.
build/.abi: $(DEPS) FORCE
	@mkdir -p build
	@$(RUN) -c "import sys, importlib.metadata as m; print(sys.version, m.version('torch'), '$(DETKIT_CUDA)$(FORCE_CUDA)')" > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else rm -rf build/temp.* build/cmake* detkit/_C*.so; mv $@.new $@; fi

build/.ext: build/.abi setup.py $(CSRC)
	$(RUN) setup.py -q build_ext --inplace
	@touch $@

# A process per core, one thread each; what a file prepares once is shared within its process.
test: build/.ext
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests --durations=10 -n $(TEST_JOBS) --dist loadfile

test-gpu: build/.ext
	$(RUN) -m pytest tests -m gpu

# The C++ tests; `sanitize` runs them again under AddressSanitizer and UndefinedBehaviorSanitizer.
ctest: build/.abi
	$(CMAKE) -S . -B build/cmake
	cmake --build build/cmake -j $(MAX_JOBS)
	ctest --test-dir build/cmake --output-on-failure --no-tests=error

sanitize: build/.abi
	$(CMAKE) -S . -B build/cmake-sanitize -DDETKIT_SANITIZE=ON
	cmake --build build/cmake-sanitize -j $(MAX_JOBS)
	ctest --test-dir build/cmake-sanitize --output-on-failure --no-tests=error

# Compiles, links and imports the CUDA kernels; needs nvcc, but neither a GPU nor a CUDA torch.
kernels: $(DEPS)
	$(RUN) tools/cuda_dry_build.py

# The torchvision that tests and benchmarks compare with.
peer: $(DEPS)
	$(DETKIT_SHARED)/tools/torchvision_cpu/setup.sh .peer

# What `make gpu` needs where there is neither network nor data goes into .carry/.
carry: $(DEPS)
	PYTHON=$(RUN) tools/carry.sh

# Everything that needs a GPU: build, tests, benchmarks, a training run; with the virtual environment only where it is.
GPU = env -u MAX_JOBS PYTHON=$(firstword $(wildcard $(VENV:%=%/bin/python)) $(PY)) tools/gpu.sh
gpu:
	$(GPU)

# The same script, tiny and on the CPU.
gpu-rehearsal: build/.ext
	DEVICE=cpu OUT=build/gpu_rehearsal $(GPU)

bench: build/.ext
	$(RUN) -m detkit.cli bench ops --save build/bench_ops.json

fmt: $(DEPS)
	$(RUN) -m ruff check -q --fix .
	$(RUN) -m ruff format -q .
	clang-format -i $(filter %.cpp %.h %.cu %.cuh,$(CSRC))

lint: $(DEPS)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	@clang-format --dry-run -Werror $(filter %.cpp %.h %.cu %.cuh,$(CSRC))

types: $(DEPS)
	$(RUN) -m mypy

check: lint types test kernels

# The pages as a site in build/site, without anything from the network; a warning is an error.
docs: $(DEPS)
	$(RUN) -m sphinx -q -n -W --keep-going -c docs . build/site

demo: build/.ext
	$(RUN) -m detkit.cli demo

BOXES = frcnn-c4,frcnn-fpn,retinanet,rfcn,rfcn-thin,light-head,light-head-fpn

# Whole what CI runs with a few steps; about three hours on two idle cores. Results go to build/nightly.
nightly: build/.ext
	mkdir -p build/nightly
	$(RUN) -m detkit.cli demo --out build/nightly/demo-$$(date +%Y%m%d-%H%M%S)
	PYTHON=$(RUN) examples/detnas_tiny.sh build/nightly/detnas_tiny
	$(RUN) benchmarks/pod_experiment.py --device cpu --json build/nightly/pod_experiment.json
	$(RUN) benchmarks/nas_experiment.py --json build/nightly/nas_experiment.json
	@if [ -n "$$DETKIT_TEST_DATA" ]; then \
	  $(RUN) benchmarks/train_detectors.py --data "$$DETKIT_TEST_DATA/bccd" --only $(BOXES) --json build/nightly/bccd.json; \
	else echo "DETKIT_TEST_DATA is not set: no detectors trained on bccd"; fi

clean:
	rm -rf build dist detkit/_C*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
