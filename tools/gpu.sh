#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: build in place, GPU tests, operator benchmark.
# Uses PYTHON (default python3) as it is and installs nothing; results go to OUT (default build/gpu).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-build/gpu}
mkdir -p "$out"
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} MAX_JOBS=${MAX_JOBS:-$(nproc)} DETKIT_CUDA=1 DETKIT_OPS=native
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

rm -f detkit/_C*.so
timeout 180 "$python" setup.py -q build_ext --inplace 2>&1 | tee "$out/build.log" | tail -n 5
"$python" -c 'import json, detkit.doctor; print(json.dumps(detkit.doctor.report(), indent=1))' | tee "$out/doctor.json"
# The operators' tests need torch, pytest and hypothesis; the rest also what detkit depends on.
tests=(tests/test_nms.py tests/test_roi_ops.py tests/test_conv_ops.py)
if "$python" -c 'import tomli_w, pycocotools, click, rich' 2>/dev/null; then tests=(tests); fi
failed=0
timeout 200 "$python" -m pytest "${tests[@]}" -m gpu -q 2>&1 | tee "$out/tests.log" | tail -n 40 || failed=1
timeout 140 "$python" benchmarks/ops.py --device cuda --json "$out/ops.json" 2>&1 | tee "$out/ops.log" || failed=1
exit $failed
