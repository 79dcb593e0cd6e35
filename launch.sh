#!/usr/bin/env bash
# Trains on this machine, on a TPU pod, or under Slurm. The same command again continues where it stopped.
#
#   ./launch.sh local [sweep] --config=FILE [--config.FIELD=VALUE ...] --workdir=DIR
#   ./launch.sh tpu NAME ZONE [--type=v5e-16] [--spot] [--version=IMAGE] [--setup=COMMAND] [--delete]\
#            [sweep] --config=FILE ...
#   ./launch.sh slurm [SRUN OPTIONS] [sweep] --config=FILE ...
#
# tpu: uses the TPU of that name, or requests one of --type and waits for it. It copies this tree (without runs/),
# installs the requirements, runs COMMAND on all workers, trains there, shows worker 0's log, and says how each worker
# ended. WORKDIR, and pairs and models that are not on the hub, must be in storage that all workers share, or in a mounted
# bucket; COMMAND can mount it, and log in where weights or metrics ask for that. --delete gives the TPU back at the end,
# however the run ended.
# sweep starts dpo_jax.sweep instead of dpo_jax.train. --print, as the first argument, shows every command and runs none.
set -euo pipefail
cd "$(dirname "$0")"

PRINT=""
if [[ "${1:-}" == --print ]]; then PRINT=yes; shift; fi

usage() { sed -n '4,7s/^#   //p' "$0" >&2; exit 2; }

run() {  # runs a command, or with --print shows it
  if [[ -n "$PRINT" ]]; then (printf '%q ' "$@" | sed 's/ $//'; echo); else "$@"; fi
}

become() {  # runs the last command in place of this shell, so that signals reach it
  if [[ -n "$PRINT" ]]; then run "$@"; else exec "$@"; fi
}

split() {  # puts the launcher's own arguments into OWN, those of the command into ARGUMENTS, and sets MODULE
  OWN=() MODULE=dpo_jax.train
  while [[ $# -gt 0 && "$1" != sweep && "$1" != --config=* ]]; do OWN+=("$1"); shift; done
  if [[ "${1:-}" == sweep ]]; then MODULE=dpo_jax.sweep; shift; fi
  if [[ "${1:-}" != --config=* ]]; then usage; fi
  ARGUMENTS=("$@")
}

state() {  # the state of the queued resource, empty if there is none
  [[ -n "$PRINT" ]] || gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
    --format='value(state.state)' 2>/dev/null || true
}

acquire() {  # makes sure that the TPU is there, whatever was there before
  if [[ -z "$PRINT" && "$(gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --format='value(state)' \
      2>/dev/null)" == READY ]]; then echo "$NAME is there" >&2; return; fi
  local found; found="$(state)"
  if [[ "$found" == SUSPENDED || "$found" == FAILED ]]; then  # preempted, or never granted
    run gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
    found=""
  fi
  if [[ -z "$found" ]]; then
    if [[ -z "$TYPE" ]]; then echo "there is no TPU $NAME in $ZONE: say which to ask for, --type=v5e-16" >&2; exit 1; fi
    run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
      --accelerator-type="$TYPE" --runtime-version="$VERSION" ${SPOT:+--spot}
  fi
  local unknown=0
  until [[ -n "$PRINT" || "$found" == ACTIVE ]]; do
    found="$(state)"
    if [[ -n "$found" ]]; then unknown=0; else unknown=$((unknown + 1)); fi
    if [[ "$unknown" -ge 10 ]]; then echo "gcloud does not know $NAME any more: are you logged in?" >&2; exit 1; fi
    case "$found" in
      ACTIVE) ;;
      SUSPENDED|FAILED) echo "$NAME: $found; the same command asks again" >&2; exit 1 ;;
      *) echo "waiting for $NAME: ${found:-requested}" >&2; sleep "${POLL_SECONDS:-30}" ;;
    esac
  done
}

on() {  # on WORKERS COMMAND: runs a command on workers of the TPU
  run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

tpu() {
  [[ $# -ge 3 ]] || usage
  NAME="$1" ZONE="$2"; shift 2
  TYPE="" VERSION="" SPOT="" SETUP="" DELETE=""
  split "$@"
  for option in ${OWN[@]+"${OWN[@]}"}; do
    case "$option" in
      --type=*) TYPE="${option#*=}" ;;
      --version=*) VERSION="${option#*=}" ;;
      --spot) SPOT=yes ;;
      --setup=*) SETUP="${option#*=}" ;;
      --delete) DELETE=yes ;;
      *) echo "launch.sh tpu does not know $option" >&2; usage ;;
    esac
  done
  TYPE="${TYPE/#v5e-/v5litepod-}"  # Google Cloud's name for it
  case "$TYPE" in
    v5litepod-*) VERSION="${VERSION:-v2-alpha-tpuv5-lite}" ;;
    v5p-*) VERSION="${VERSION:-v2-alpha-tpuv5}" ;;
    v6e-*) VERSION="${VERSION:-v2-alpha-tpuv6e}" ;;
    *) VERSION="${VERSION:-tpu-ubuntu2204-base}" ;;
  esac
  if [[ -n "$DELETE" ]]; then
    trap 'run gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet' EXIT
  fi
  acquire
  local tree; tree="${TMPDIR:-/tmp}/dpo_jax-$NAME.tgz"
  run tar --exclude=./.git --exclude=./runs --exclude=./.venv --exclude=__pycache__ -czf "$tree" .
  run gcloud compute tpus tpu-vm scp "$tree" "$NAME:dpo_jax.tgz" --zone="$ZONE" --worker=all
  # The images' own Python may be older than 3.11; uv brings one.
  on all 'mkdir -p dpo_jax && tar xzf dpo_jax.tgz -C dpo_jax && cd dpo_jax && python3 -m pip install -q --user uv &&
    python3 -m uv venv -q --allow-existing --python 3.11 .venv &&
    python3 -m uv pip install -q -p .venv -r requirements.txt "jax[tpu]"'
  local command; command="$(printf '%q ' .venv/bin/python -m "$MODULE" "${ARGUMENTS[@]}")"
  # The run outlives a broken connection; the same command then finds it running, and only shows its log.
  on all "cd dpo_jax && if ! kill -0 \$(cat pid 2>/dev/null) 2>/dev/null; then rm -f status
    { ${SETUP:-true}
    } || exit 1
    nohup bash -c $(printf '%q' "$command; echo \$? >status") >log 2>&1 </dev/null & echo \$! >pid; fi"
  on 0 "cd dpo_jax && tail -n +1 -F --pid=\$(cat pid) log" ||
    { trap - EXIT; echo "the connection broke; the same command looks on" >&2; exit 1; }  # and it is not deleted
  # shellcheck disable=SC2016  # the variables are the workers'
  on all 'cd dpo_jax && while kill -0 $(cat pid) 2>/dev/null; do sleep 1; done
    echo "$(hostname) ended with $(cat status)"; [ "$(cat status)" = 0 ] || { tail -n 20 log; exit 1; }'
}

[[ $# -gt 0 ]] || usage
WHERE="$1"; shift
case "$WHERE" in
  local) split "$@"; [[ ${#OWN[@]} -eq 0 ]] || usage; become python -m "$MODULE" "${ARGUMENTS[@]}" ;;
  tpu) tpu "$@" ;;
  slurm) split "$@"
    become srun --ntasks-per-node=1 --kill-on-bad-exit=1 ${OWN[@]+"${OWN[@]}"} python -m "$MODULE" "${ARGUMENTS[@]}" ;;
  *) usage ;;
esac
