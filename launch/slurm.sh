#!/usr/bin/env bash
# A batch job that goes back to the queue when it was stopped. `./launch.sh slurm --retry` submits
# it.
#
#   sbatch [OPTIONS] launch/slurm.sh RETRIES COMMAND [ARGUMENT ...]
#
# Slurm itself requeues a job whose nodes fail or are taken by others (sbatch --requeue), but not
# one that has reached its time limit. It sends that one SIGTERM some time before (sbatch --signal),
# and the run saves and ends with status 143. A run that has lost a host, or waited in vain for one,
# ends with 75, and one that was killed with another signal's status.
set -uo pipefail

retries="$1"
shift

# srun returns the highest status of its tasks. A mistake in the command is 2, and if srun then
# killed the other tasks it would return their 143. They need no killing: each finds a mistake in
# the flags by itself, and once they have met, all end with the status of the first.
srun --ntasks-per-node=1 --kill-on-bad-exit=0 "$@"
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
