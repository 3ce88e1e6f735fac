#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: build in place, GPU tests, benchmarks of the ways to compute an
# operator, of operators, of whole detectors and of training, and a training run.
#
#   [PYTHON=python3] [OUT=build/gpu] [DEVICE=cuda] tools/gpu.sh
#
# Uses PYTHON as it is and installs nothing; what that Python lacks, and the data, come from .carry/, which `make carry`
# fills. A stage that fails or takes too long ends alone: the others run and keep their results. OUT gets log.txt and
# seven more files at most, since machines that are lent bring little back. DEVICE=cpu is a rehearsal: the same stages,
# tiny, on an extension that is there already.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-build/gpu} device=${DEVICE:-cuda} minutes=${MINUTES:-0.75}
run=build/gpu_run # of the training: its checkpoints are too large to bring back
most=560          # seconds for everything
mkdir -p "$out"
rm -rf "$run" "$out"/{ops,ways,detect,speed,bench_train}.json "$out/train.jsonl"
: >"$out/log.txt"

# ninja, without which the build is serial, often lies beside the interpreter only
PATH=$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH
cores=$("$python" -c 'import os; print(os.cpu_count())')
export PATH PYTHONUNBUFFERED=1 DETKIT_CUDA=1 DETKIT_OPS=native PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} MAX_JOBS=${MAX_JOBS:-$cores}
if [ -d .carry ]; then
  export PYTHONPATH=$PYTHONPATH:$PWD/.carry DETKIT_TEST_DATA=$PWD/.carry/data # its packages come after installed ones
fi

say() { echo "$*" | tee -a "$out/log.txt"; }

failed=()
# stage NAME SECONDS COMMAND…
stage() {
  local name=$1 limit=$2 left=$((most - SECONDS)) begun=$SECONDS status=0
  shift 2
  if [ "$left" -lt 15 ]; then
    say "== $name: left out, the time is over"
    failed+=("$name")
    return 1
  fi
  say "== $name: $*"
  timeout -k 5 $((limit < left ? limit : left)) "$@" 2>&1 | tee -a "$out/log.txt"
  status=${PIPESTATUS[0]}
  say "== $name: exit $status after $((SECONDS - begun)) s"
  [ "$status" = 0 ] || failed+=("$name")
  return "$status"
}

finish() {
  if [ -f "$run/metrics.jsonl" ]; then tail -n 500 "$run/metrics.jsonl" >"$out/train.jsonl"; fi
  say "== failed: ${failed[*]:-none} (after $SECONDS s)"
  [ ${#failed[@]} = 0 ]
  exit
}

# Quick and full forms of what follows.
bench=("$python" -m detkit.cli bench)
if [ "$device" = cuda ]; then
  rm -f detkit/_C*.so
  stage facts 30 bash -c 'nvidia-smi; command -v nvcc ninja; nvcc --version'
  stage build 200 "$python" setup.py -q build_ext --inplace || finish
  ops=() ways=() detect=(--seconds 12) step=(--recipe detnet/resnet50-fpn --steps 20 --workers 12) data=synthetic
  speed=(--images 60 --warmup 15)
  # full-size DetNet-59-FPN from scratch, so with trainable norms
  train=(--recipe detnet/detnet59-fpn --minutes "$minutes" --batch-size 8 --workers 12 --set model.norm=gn --set model.frozen_stages=0
    --set model.head_norm=gn --set train.amp=bf16 --set train.clip=10.0)
  # the operators' tests need torch, pytest and hypothesis alone
  tests=(tests/test_nms.py tests/test_roi_ops.py tests/test_conv_ops.py tests/test_autotune.py)
  if "$python" -c 'import tomli_w, pycocotools, click, rich'; then tests=(tests); fi
  if [ -d "${DETKIT_TEST_DATA:-}/bccd" ]; then data=$DETKIT_TEST_DATA/bccd; fi
else
  export OMP_NUM_THREADS=1
  ops=(--only ps_roi_align --threads 1) ways=(--small) detect=(--small --seconds 0.1) step=(--recipe tiny/light-head --steps 1)
  speed=(--case light-head/setting-s-700@64x96 --images 1 --warmup 1)
  train=(--recipe tiny/light-head --steps 2) tests=(tests/test_autotune.py) data=synthetic
fi
stage doctor 30 "$python" -m detkit.cli doctor
parallel=()
if [ "$device" = cuda ] && "$python" -c 'import xdist'; then parallel=(-p xdist.plugin -n 8 --dist worksteal); fi
# without other plugins of that Python
PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 stage tests 170 "$python" -m pytest "${tests[@]}" "${parallel[@]}" -m gpu -q --continue-on-collection-errors
stage ways 70 "$python" benchmarks/cuda_ways.py --device "$device" "${ways[@]}" --json "$out/ways.json"
# without a choice of ways, so that what is measured as ours is ours
DETKIT_AUTOTUNE=off stage ops 110 "${bench[@]}" ops --device "$device" --quick "${ops[@]}" --save "$out/ops.json"
stage detect 45 "$python" benchmarks/detect_speed.py --device "$device" "${detect[@]}" --json "$out/detect.json"
stage train 110 "$python" -m detkit.cli finetune --data "$data" "${train[@]}" --device "$device" --out "$run"
stage bench_train 60 "${bench[@]}" train --device "$device" --data "$data" "${step[@]}" --save "$out/bench_train.json"
stage speed 60 "$python" benchmarks/speed.py --device "$device" "${speed[@]}" --json "$out/speed.json"
finish
