#!/usr/bin/env bash
# Train on this machine, on a TPU pod, or under Slurm. The same command resumes the run.
#
#   ./launch.sh local [OPTIONS] [sweep] --config=FILE [--config.FIELD=VALUE ...] --workdir=WORKDIR
#   ./launch.sh tpu NAME ZONE [--type=v5e-16] [--spot] [--service-account=EMAIL] [--version=IMAGE]
#            [--setup=COMMAND] [--delete] [OPTIONS] [sweep] --config=FILE ...
#   ./launch.sh slurm [SRUN OPTIONS] [OPTIONS] [sweep] --config=FILE ...
#
#   OPTIONS
#     --env=NAME, --env=NAME=VALUE  gives the run an environment variable: yours, or this value.
#                                   Repeat it for several. Secrets are best given as --env=NAME.
#     --retry, --retry=N            starts the run again when it is preempted or killed, or when a
#                                   host did not come, N times at most (10 without N). A run that
#                                   fails by itself is not repeated.
#
# tpu: uses the TPU of that name, or requests one of --type and waits for it. It copies this tree
# (without runs/), installs the requirements, runs COMMAND on all workers, trains there, shows
# worker 0's log, and says how each worker ended. WORKDIR is gs://BUCKET/FOLDER, or a folder that
# all workers share. --delete deletes the TPU at the end, even when the run has failed, and at
# Ctrl-C.
#
# slurm: with --retry, the run becomes a batch job that goes back to the queue when its time is up
# or its nodes are taken; the options then go to sbatch instead of srun.
#
# sweep starts dpo_jax.sweep instead of dpo_jax.train. --print, as the first argument, shows every
# command and runs none; values of variables are not shown.
set -euo pipefail
cd "$(dirname "$0")"

# How a run ends (docs/runs.md).
MISTAKE=2    # no other start mends it
TRY_AGAIN=75 # another host was lost, or did not come
# How an attempt on a TPU ends.
LOST=75      # its workers were preempted, killed or rebooted, or may go through the next time
BROKEN=76    # its workers are there, but do not answer

PRINT=""
if [[ "${1:-}" == --print ]]; then PRINT=yes; shift; fi

usage() {
  sed -n '4,14s/^# \{1,3\}//p' "$0" >&2
  exit 2
}

refuse() {  # ends with a mistake of the user's
  echo "error: $*" >&2
  exit 2
}

say() {
  echo "$*" >&2
}

run() {  # runs a command, or with --print shows it
  if [[ -n "$PRINT" ]]; then (printf '%q ' "$@" | sed 's/ $//'; echo); else "$@"; fi
}

become() {  # runs the last command in place of this shell, so that signals reach it
  if [[ -n "$PRINT" ]]; then run "$@"; else exec "$@"; fi
}

# ---- arguments ----

VARIABLES=()  # names
VALUES=()
RETRIES=0
OWN=()  # options of this way alone

add_variable() {  # of NAME or NAME=VALUE; VALUE is never shown
  local name="${1%%=*}"
  [[ "$name" =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] ||
    refuse "--env=$name: expected --env=NAME or --env=NAME=VALUE, and this is no variable's name."
  VARIABLES+=("$name")
  if [[ "$1" == *=* ]]; then
    VALUES+=("${1#*=}")
  elif [[ -n "${!name+set}" ]]; then
    VALUES+=("${!name}")
  else
    refuse "--env=$name: the variable is not set here. Set it, or give --env=$name=VALUE."
  fi
}

split() {  # sets OWN and what all ways share; ARGUMENTS and MODULE are what is run
  MODULE=dpo_jax.train
  while [[ $# -gt 0 && "$1" != sweep && "$1" != --config=* ]]; do
    case "$1" in
      --env=*) add_variable "${1#*=}" ;;
      --retry) RETRIES=10 ;;
      --retry=*)
        RETRIES="${1#*=}"
        [[ "$RETRIES" =~ ^[0-9]{1,6}$ ]] ||
          refuse "$1: expected a number of times, as in --retry=10."
        RETRIES=$((10#$RETRIES)) ;;
      *) OWN+=("$1") ;;
    esac
    shift
  done
  if [[ "${1:-}" == sweep ]]; then MODULE=dpo_jax.sweep; shift; fi
  if [[ "${1:-}" != --config=* ]]; then usage; fi
  ARGUMENTS=("$@")
}

export_variables() {
  local i
  for i in ${VARIABLES[@]+"${!VARIABLES[@]}"}; do
    if [[ -n "$PRINT" ]]; then echo "export ${VARIABLES[i]}=***"
    else export "${VARIABLES[i]}=${VALUES[i]}"; fi
  done
}

may_go_through() {  # whether another start may mend a status
  # Those of signals, but for Ctrl-C's.
  [[ "$1" == "$TRY_AGAIN" || ( "$1" -gt 128 && "$1" != 130 ) ]]
}

# ---- this machine ----

repeat() {  # runs a command, and again when a signal ended it that was not sent to this script
  local child="" status tries=0 asked=""
  # In a group of its own the command does not see Ctrl-C, and gets it once, from here.
  set -m
  trap 'asked=yes; kill -TERM "$child"' TERM
  trap 'asked=yes; kill -INT "$child"' INT
  while true; do
    "$@" &
    child=$!
    status=0
    wait "$child" || status=$?
    # A signal to this script interrupts `wait`, and the command then saves.
    while kill -0 "$child" 2>/dev/null; do
      status=0
      wait "$child" || status=$?
    done
    if [[ -n "$asked" ]] || ! may_go_through "$status"; then exit "$status"; fi
    if [[ "$tries" -ge "$RETRIES" ]]; then
      say "the run was stopped (status $status), and was started again $tries times: giving up"
      exit "$status"
    fi
    tries=$((tries + 1))
    say "the run was stopped (status $status); starting it again, $tries of $RETRIES"
  done
}

on_this_machine() {
  split "$@"
  [[ ${#OWN[@]} -eq 0 ]] || usage
  export_variables
  if [[ "$RETRIES" -gt 0 && -z "$PRINT" ]]; then
    repeat python -m "$MODULE" "${ARGUMENTS[@]}"
  else
    become python -m "$MODULE" "${ARGUMENTS[@]}"
  fi
}

# ---- Slurm ----

under_slurm() {
  split "$@"
  local option
  if [[ ${#VARIABLES[@]} -gt 0 ]]; then
    for option in ${OWN[@]+"${OWN[@]}"}; do
      [[ "$option" != --export=* ]] ||
        refuse "--env and srun's --export say two things of one environment: give one of them."
    done
    # Slurm then sends the whole environment, in which values are not seen in the process list.
    OWN+=(--export=ALL)
  fi
  export_variables
  if [[ "$RETRIES" -gt 0 ]]; then
    become sbatch --requeue --signal=TERM@120 --open-mode=append --ntasks-per-node=1 \
      ${OWN[@]+"${OWN[@]}"} launch/slurm.sh "$RETRIES" python -m "$MODULE" "${ARGUMENTS[@]}"
  else
    # As in launch/slurm.sh: the status is then the first failure's.
    become srun --ntasks-per-node=1 --kill-on-bad-exit=0 ${OWN[@]+"${OWN[@]}"} \
      python -m "$MODULE" "${ARGUMENTS[@]}"
  fi
}

# ---- TPUs ----

node_state() {  # empty if there is no such TPU
  [[ -n "$PRINT" ]] || gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" \
    --format='value(state)' 2>/dev/null || true
}

request_state() {  # the state of the queued resource, empty if there is none
  [[ -n "$PRINT" ]] || gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
    --format='value(state.state)' 2>/dev/null || true
}

say_why_refused() {
  gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
    --format='value(state.failedData.error.message)' >&2 || true
}

delete_tpu() {
  run gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
}

request() {
  [[ -n "$TYPE" ]] || {
    say "there is no TPU $NAME in $ZONE: say which to ask for, --type=v5e-16"
    exit 1
  }
  # What is wrong here stays wrong: no permission, no quota, no such type.
  run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
    --accelerator-type="$TYPE" --runtime-version="$VERSION" ${SPOT:+--spot} \
    ${ACCOUNT:+--service-account="$ACCOUNT"} || exit 1
}

acquire() {  # makes sure that the TPU is there, whatever was there before
  local node found requested="" unknown=0
  while true; do
    node="$(node_state)"
    if [[ "$node" == READY ]]; then say "$NAME is there"; return 0; fi
    found="$(request_state)"
    # What earlier runs left: a request that was preempted, or never granted, is of no more use.
    if [[ -z "$requested" && ( "$found" == SUSPENDED || "$found" == FAILED ) ]]; then
      delete_tpu || exit 1
      found=""
    fi
    if [[ -z "$requested" && -z "$found" ]]; then
      request
      if [[ -n "$PRINT" ]]; then return 0; fi
      requested=yes
      found=requested
    fi
    if [[ -n "$found" ]]; then unknown=0; else unknown=$((unknown + 1)); fi
    if [[ "$unknown" -ge 10 ]]; then
      say "gcloud does not know $NAME any more: are you logged in?"
      exit 1
    fi
    case "$found" in
      FAILED) say "$NAME: the request has failed"; say_why_refused; exit 1 ;;
      SUSPENDED) return "$LOST" ;;
      *) say "waiting for $NAME: ${found:-no answer}${node:+, the TPU is $node}" ;;
    esac
    sleep "${POLL_SECONDS:-30}"
  done
}

on() {  # on WORKERS COMMAND: runs a command on workers of the TPU
  run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

copy() {  # copy FILE NAME: copies a file to all workers' home folders
  run gcloud compute tpus tpu-vm scp "$1" "$NAME:$2" --zone="$ZONE" --worker=all
}

lost_or_broken() {  # what a command that did not reach its workers means
  if [[ "$(node_state)" == READY ]]; then return "$BROKEN"; else return "$LOST"; fi
}

on_all() {  # runs a command on all workers; 1 where one of them says that it failed
  if [[ -n "$PRINT" ]]; then on all "$1"; return; fi
  if on all "$1" | tee "$FOLDER/said"; then return 0; fi
  if grep -q 'failed on ' "$FOLDER/said"; then return 1; fi
  lost_or_broken
}

pack() {  # makes what is sent, once: retries train the same code, whatever is edited meanwhile
  run tar --exclude=./.git --exclude=./runs --exclude=./.venv --exclude=__pycache__ \
    -czf "$FOLDER/dpo_jax.tgz" .
  if [[ -n "$PRINT" ]]; then
    [[ ${#VARIABLES[@]} -eq 0 ]] ||
      (printf '# dpo_jax.env:'; printf ' %s=***' "${VARIABLES[@]}"; echo)
    return
  fi
  # Variables travel in a file that others cannot read: a command would be in the list of processes.
  local i
  (
    umask 077
    for i in ${VARIABLES[@]+"${!VARIABLES[@]}"}; do
      printf 'export %s=%q\n' "${VARIABLES[i]}" "${VALUES[i]}"
    done >"$FOLDER/dpo_jax.env"
  )
}

send() {  # copies and installs; on workers where the run is at work nothing is changed
  copy "$FOLDER/dpo_jax.tgz" dpo_jax.tgz || { lost_or_broken; return; }
  if [[ ${#VARIABLES[@]} -gt 0 ]]; then
    copy "$FOLDER/dpo_jax.env" dpo_jax.env || { lost_or_broken; return; }
  fi
  # The images' own Python may be older than 3.11; uv brings one.
  # shellcheck disable=SC2016  # the variables are the workers'
  on_all 'if kill -0 $(cat dpo_jax/pid 2>/dev/null) 2>/dev/null; then exit 0; fi
    chmod -f 600 dpo_jax.env
    mkdir -p dpo_jax && tar xzf dpo_jax.tgz -C dpo_jax && cd dpo_jax &&
    python3 -m pip install -q --user uv &&
    python3 -m uv venv -q --allow-existing --python 3.11 .venv &&
    python3 -m uv pip install -q -p .venv -e ".[tpu,gcs,s3]" ||
    { echo "the installation failed on $(hostname)"; exit 1; }'
}

start() {  # starts the run where it is not at work
  local command
  command="$(printf '%q ' .venv/bin/python -m "$MODULE" "${ARGUMENTS[@]}")"
  # The run outlives a broken connection; the same command then finds it, and only shows its log.
  on_all "cd dpo_jax || exit 1
    if kill -0 \$(cat pid 2>/dev/null) 2>/dev/null; then rm -f ../dpo_jax.env; exit 0; fi
    rm -f status
    if [ -f ../dpo_jax.env ]; then . ../dpo_jax.env; rm -f ../dpo_jax.env; fi
    { ${SETUP:-true}
    } || { echo \"--setup failed on \$(hostname)\"; exit 1; }
    nohup bash -c $(printf '%q' "$command; echo \$? >status") >log 2>&1 </dev/null & echo \$! >pid"
}

watch_log() {
  on 0 "cd dpo_jax && tail -n +1 -F --pid=\$(cat pid) log" || lost_or_broken
}

wait_for_workers() {  # says how each worker ended
  local answered=yes status
  # shellcheck disable=SC2016  # the variables are the workers'
  local command='cd dpo_jax && while kill -0 $(cat pid) 2>/dev/null; do sleep 1; done
    status="$(cat status 2>/dev/null)"
    echo "$(hostname) ended with ${status:-no status}"
    [ "$status" = 0 ] || { tail -n 20 log; exit 1; }'
  if [[ -n "$PRINT" ]]; then on all "$command"; return; fi
  on all "$command" | tee "$FOLDER/said" || answered=""
  # One that was rebooted has left no status.
  if grep -q ' ended with no status$' "$FOLDER/said"; then return "$LOST"; fi
  # A mistake on one worker ends the others by signals, or lets them wait in vain.
  if grep -q " ended with $MISTAKE\$" "$FOLDER/said"; then return 1; fi
  while read -r status; do
    if may_go_through "$status"; then return "$LOST"; fi
  done < <(sed -n 's/^.* ended with \([0-9]*\)$/\1/p' "$FOLDER/said")
  if [[ -n "$answered" ]]; then return 0; fi
  lost_or_broken || status=$?
  # A TPU that is there, and a worker that says how it failed: the run has failed by itself.
  if [[ "$status" == "$BROKEN" ]] && grep -q ' ended with [1-9]' "$FOLDER/said"; then return 1; fi
  return "$status"
}

attempt() {
  # Called where bash ignores `set -e`: each step says itself how it ended.
  acquire || return
  send || return
  start || return
  watch_log || return
  wait_for_workers
}

leave() {
  if [[ -n "$FOLDER" ]]; then rm -rf "$FOLDER"; fi
  if [[ -n "$DELETE" ]]; then delete_tpu; fi
}

on_tpu() {
  [[ $# -ge 3 ]] || usage
  NAME="$1" ZONE="$2"
  shift 2
  TYPE="" VERSION="" SPOT="" SETUP="" ACCOUNT=""
  local delete="" option status tries=0
  split "$@"
  for option in ${OWN[@]+"${OWN[@]}"}; do
    case "$option" in
      --type=*) TYPE="${option#*=}" ;;
      --version=*) VERSION="${option#*=}" ;;
      --spot) SPOT=yes ;;
      --service-account=*) ACCOUNT="${option#*=}" ;;
      --setup=*) SETUP="${option#*=}" ;;
      --delete) delete=yes ;;
      *) say "launch.sh tpu does not know $option"; usage ;;
    esac
  done
  TYPE="${TYPE/#v5e-/v5litepod-}"  # Google Cloud's name for it
  case "$TYPE" in
    v5litepod-*) VERSION="${VERSION:-v2-alpha-tpuv5-lite}" ;;
    v5p-*) VERSION="${VERSION:-v2-alpha-tpuv5}" ;;
    v6e-*) VERSION="${VERSION:-v2-alpha-tpuv6e}" ;;
    *) VERSION="${VERSION:-tpu-ubuntu2204-base}" ;;
  esac
  FOLDER=/tmp DELETE="$delete"
  if [[ -n "$PRINT" ]]; then
    trap '[[ -z "$DELETE" ]] || delete_tpu' EXIT
  else
    FOLDER="$(mktemp -d)"
    trap leave EXIT
    # gcloud ends by itself at Ctrl-C, which would look like a broken connection.
    trap 'exit 130' INT
    trap 'exit 143' TERM
  fi
  pack
  while true; do
    status=0
    attempt || status=$?
    if [[ "$status" != "$LOST" && "$status" != "$BROKEN" ]]; then exit "$status"; fi
    if [[ "$tries" -ge "$RETRIES" ]]; then break; fi
    tries=$((tries + 1))
    if [[ "$status" == "$LOST" ]]; then
      say "the run on $NAME was lost: starting again, $tries of $RETRIES"
    else
      say "$NAME does not answer: looking again, $tries of $RETRIES"
    fi
    sleep "${POLL_SECONDS:-30}"
  done
  if [[ "$tries" -gt 0 ]]; then say "giving up after $tries retries"; fi
  if [[ "$status" == "$LOST" ]]; then
    say "the run on $NAME was lost; the same command resumes it (--retry does so by itself)"
  else
    say "the connection broke; the same command shows the log again"
    DELETE=""  # the run may be at work
  fi
  exit 1
}

[[ $# -gt 0 ]] || usage
WHERE="$1"
shift
case "$WHERE" in
  local) on_this_machine "$@" ;;
  tpu) on_tpu "$@" ;;
  slurm) under_slurm "$@" ;;
  *) usage ;;
esac
