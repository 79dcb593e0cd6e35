#!/usr/bin/env bash
# Checks and measurements of one GPU, in at most 8 minutes and without a network; docs/performance.md
# says how to prepare for it. PYTHON names the interpreter (default: python3).
#   experiments/benchmark/gpu.sh [--out=DIR] [--wheels=DIR] [--parts=tests,checks,benchmark]
#   JAX_PLATFORMS=cpu experiments/benchmark/gpu.sh --rehearse
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" -m experiments.benchmark.gpu "$@"
