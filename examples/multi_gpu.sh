#!/usr/bin/env bash
# One training on all GPUs of this machine, or of several machines; extra arguments go to detkit.
#
#   examples/multi_gpu.sh --data my_set --recipe detnet/detnet59-fpn --out runs/all-gpus
#
# On several machines, start the same line on each with the first one's name and a number of its own:
#
#   NODES=2 NODE=0 FIRST=gpu-a examples/multi_gpu.sh --data /shared/my_set --out /shared/runs/one
#   NODES=2 NODE=1 FIRST=gpu-a examples/multi_gpu.sh --data /shared/my_set --out /shared/runs/one
#
# What changes with the number of processes: nothing in the result's definition. train.batch_size is
# the batch of all processes together and must be a multiple of their number (times
# train.accumulate); the learning rate follows the batch, optim.lr being that of 16 images; batch
# norms see the images of one process unless model.norm is sync_bn. The first process writes the
# run folder, so --out must be on a disk that all machines share only if any of them may become
# node 0 when training is resumed (--resume auto).
set -euo pipefail

PROCESSES=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)} # per machine; one GPU each
NODES=${NODES:-1}
NODE=${NODE:-0}
FIRST=${FIRST:-localhost}
PORT=${PORT:-29500}

if [ "$NODES" = 1 ]; then
  exec python -m detkit.cli finetune --gpus "$PROCESSES" "$@"
fi
exec torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "$PROCESSES" \
  --master-addr "$FIRST" --master-port "$PORT" -m detkit.cli finetune "$@"
