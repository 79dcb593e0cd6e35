#!/usr/bin/env bash
# A batch job that goes back to the queue when it was stopped. `./launch.sh slurm --retry` submits it.
#
#   sbatch [OPTIONS] launch/slurm.sh RETRIES COMMAND [ARGUMENT ...]
#
# Slurm itself requeues a job whose nodes fail or are taken by others (sbatch --requeue), but not one
# that has reached its time limit. There it sends SIGTERM some time before (sbatch --signal), and the
# run saves and ends with status 143. One that has lost a host, or waited in vain for one, ends with
# 75, and one that was killed with another signal's status.
set -uo pipefail

retries="$1"
shift

srun --ntasks-per-node=1 --kill-on-bad-exit=1 "$@"
status=$?
# Status 130 is Ctrl-C's.
[[ "$status" == 75 || ( "$status" -gt 128 && "$status" != 130 ) ]] || exit "$status"

# A job that is cancelled or taken gets SIGTERM too, and is not RUNNING any more.
state="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)"
[[ "$state" == RUNNING ]] || exit "$status"
if [[ "${SLURM_RESTART_COUNT:-0}" -ge "$retries" ]]; then
  echo "the run was started $((retries + 1)) times: giving up" >&2
  exit "$status"
fi
echo "the run was stopped (status $status); job $SLURM_JOB_ID goes back to the queue" >&2
scontrol requeue "$SLURM_JOB_ID"
# Slurm ends this script.
sleep 60
exit "$status"
