#!/bin/sh
# On a machine with a GPU: are the kernels right there, and what do they cost beside cuBLAS?
#
#     tools/gpu_check.sh [RESULTS]       # or: make gpu
#
# Needs a Python with torch, Triton and pytest, nothing else (PYTHON names another than python3).
# Some minutes. Writes RESULTS/gpu-kernel-cost-SHAPE.json (default: benchmarks/results, dated).
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${1:-benchmarks/results}
day=$(date +%F)
export PYTHONPATH=.
"$python" -c 'import torch; torch.cuda.is_available() or exit("no CUDA device here")'
# Without the project's plugins and conftest, which want the whole environment.
PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "$python" -m pytest -q --noconftest -c /dev/null --rootdir . \
    -p no:cacheprovider tests/gpu_kernels.py
mkdir -p "$results"
for shape in 4096x4096 14336x4096 4096x14336; do
    "$python" -m benchmarks.gpu_kernel_cost --shape "$shape" \
        --output "$results/$day-gpu-kernel-cost-$shape.json"
done
