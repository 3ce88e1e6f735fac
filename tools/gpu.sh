#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: build in place, GPU tests, benchmarks of the operators, of the ways
# to compute one and of whole detectors, a training run.
# Uses PYTHON (default python3) as it is and installs nothing; what that Python lacks, and the data, come from .carry/,
# which `make carry` fills. Results go to OUT (default build/gpu).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-build/gpu}
mkdir -p "$out"
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} MAX_JOBS=${MAX_JOBS:-$(nproc)} DETKIT_CUDA=1 DETKIT_OPS=native
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -d .carry ]; then
  export PYTHONPATH=$PYTHONPATH:$PWD/.carry/site DETKIT_TEST_DATA=$PWD/.carry/data
fi

rm -f detkit/_C*.so
timeout 120 "$python" setup.py -q build_ext --inplace 2>&1 | tee "$out/build.log" | tail -n 5
"$python" -c 'import json, detkit.doctor; print(json.dumps(detkit.doctor.report(), indent=1))' | tee "$out/doctor.json"
# The operators' tests need torch, pytest and hypothesis; the rest also what detkit depends on.
tests=(tests/test_nms.py tests/test_roi_ops.py tests/test_conv_ops.py tests/test_autotune.py)
complete=0
if "$python" -c 'import tomli_w, pycocotools, click, rich'; then tests=(tests) complete=1; fi
failed=0
timeout 130 "$python" -m pytest "${tests[@]}" -m gpu -q 2>&1 | tee "$out/tests.log" | tail -n 40 || failed=1
# without a choice of ways, so that what is measured as ours is ours
DETKIT_AUTOTUNE=off timeout 120 "$python" -m detkit.cli bench ops --device cuda --quick --save "$out/ops.json" 2>&1 | tee "$out/ops.log" || failed=1
timeout 60 "$python" benchmarks/cuda_ways.py --json "$out/cuda_ways.json" 2>&1 | tee "$out/cuda_ways.log" || failed=1
timeout 90 "$python" benchmarks/speed.py --device cuda --images 100 --warmup 20 --json "$out/speed.json" 2>&1 |
  tee "$out/speed.log" || failed=1
if [ "$complete" = 1 ] && [ -d "${DETKIT_TEST_DATA:-}/bccd" ]; then
  # full-size DetNet-59-FPN from scratch, so with trainable norms
  timeout 110 "$python" -m detkit.cli finetune --data "$DETKIT_TEST_DATA/bccd" --recipe detnet/detnet59-fpn --json \
    --minutes "${MINUTES:-1}" --batch-size 8 --out "$out/bccd" --set model.norm=gn --set model.frozen_stages=0 \
    --set model.head_norm=gn --set train.amp=bf16 --set train.clip=10.0 >"$out/bccd.json" || failed=1
  tail -n 3 "$out/bccd/log.txt" "$out/bccd.json"
  rm -f "$out"/bccd/*.pth # too large to bring back
fi
exit $failed
