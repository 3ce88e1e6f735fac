#!/usr/bin/env bash
# DetNAS on synthetic shapes, all of it, in under fifteen minutes on two cores:
# a supernet pre-trained, fine-tuned in a detector, searched; the network found trained from nothing, and scored.
#
#   examples/detnas_tiny.sh [FOLDER]          everything it makes goes to FOLDER (detnas_tiny)
#
# Killed at any moment, the same line goes on where it was.
# A short look at all of its parts: PRETRAIN=10 FINETUNE=10 POPULATION=4 GENERATIONS=2 CALIBRATION=2
set -euo pipefail
out=${1:-detnas_tiny}
pretrain=${PRETRAIN:-700} finetune=${FINETUNE:-800}
population=${POPULATION:-8} generations=${GENERATIONS:-4} calibration=${CALIBRATION:-12}
detkit=(${PYTHON:-python3} -m detkit.cli)
mkdir -p "$out"

# The synthetic set in a size that two cores manage; one train step of the supernet is one path.
small=(--set data.short_side=128 --set data.long_side=128 --set "data.multi_scale=[]" --set data.workers=1)

echo "== 1. supernet as a classifier"
"${detkit[@]}" pretrain --backbone detnas-supernet-tiny --steps "$pretrain" \
  --set nas.eval_paths=1 --set nas.eval_calibration=5 --out "$out/supernet" --resume auto
echo "== 2. supernet in a detector; images for the search are held out"
"${detkit[@]}" finetune --recipe tiny/supernet-frcnn-fpn --init-from "$out/supernet/best.pth" --steps "$finetune" \
  "${small[@]}" --batch-size 8 --set nas.eval_paths=1 --set nas.eval_calibration=8 --out "$out/detector" --resume auto
echo "== 3. search: paths with norms of their own, scored on the held-out images"
"${detkit[@]}" search "$out/detector" --max-macs 24M --population "$population" --generations "$generations" \
  --set search.calibration_steps="$calibration" --out "$out/search" --resume auto
"${detkit[@]}" search "$out/search" --export "$out/best.toml"
echo "== 4. the network found, from nothing: as a classifier, then in the detector on all training images"
"${detkit[@]}" pretrain --recipe "$out/best.toml" --out "$out/best-backbone" --resume auto
"${detkit[@]}" finetune --recipe "$out/best-finetune.toml" --init-from "$out/best-backbone/best.pth" \
  --out "$out/best-detector" --resume auto
echo "== 5. its score on images that nothing has seen"
"${detkit[@]}" eval "$out/best-detector/best.pth" --data synthetic
