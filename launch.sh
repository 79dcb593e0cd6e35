#!/usr/bin/env bash
# Runs a training command on this machine:  ./launch.sh local --config=configs/toy.py --workdir=runs/toy
set -euo pipefail
cd "$(dirname "$0")"
case "${1:-}" in
  local) shift; exec python -m dpo_jax.train "$@" ;;
  *) echo "usage: ./launch.sh local --config=FILE [--config.FIELD=VALUE ...] --workdir=DIR" >&2; exit 2 ;;
esac
