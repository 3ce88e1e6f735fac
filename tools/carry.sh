#!/usr/bin/env bash
# Fills .carry/ (ignored by git) with what `make gpu` needs on a machine without network and data:
# the pure and pycocotools wheels of Python 3.12, unpacked, and the data sets it trains on.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${DETKIT_TEST_DATA:?must name the folder of the real data sets}
python=${PYTHON:-python3}
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$python" -m pip download -q -c constraints.txt --no-deps --only-binary=:all: --python-version 3.12 \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  -d "$wheels" click rich markdown-it-py mdurl Pygments tomli-w pycocotools pybind11 \
  pytest pluggy iniconfig packaging hypothesis sortedcontainers
rm -rf .carry && mkdir -p .carry/site .carry/data
for wheel in "$wheels"/*.whl; do "$python" -m zipfile -e "$wheel" .carry/site; done
# With .carry/ on PYTHONPATH: behind the packages of that Python, so that its own come first.
echo 'import pathlib, sys; sys.path.append(str(pathlib.Path(__file__).parent / "site"))' >.carry/sitecustomize.py
cp -r "$data/bccd" "$data/coco_mini" .carry/data/
du -sh .carry
