#!/usr/bin/env bash
# A batch job that goes back to the queue when its time is up. `./launch.sh slurm --retry` submits it.
#
#   sbatch [OPTIONS] launch/slurm.sh RETRIES COMMAND [ARGUMENT ...]
#
# Slurm itself requeues a job whose nodes fail or are taken by others (sbatch --requeue), but not one
# that has reached its time limit. There it sends SIGTERM some time before (sbatch --signal), and the
# run saves and ends with status 143. One that waited for a host in vain ends with 75.
set -uo pipefail

retries="$1"
shift

srun --ntasks-per-node=1 --kill-on-bad-exit=1 "$@"
status=$?
[[ "$status" == 143 || "$status" == 75 ]] || exit "$status"

# A job that is cancelled or taken gets SIGTERM too, and is not RUNNING any more.
state="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)"
[[ "$state" == RUNNING ]] || exit "$status"
if [[ "${SLURM_RESTART_COUNT:-0}" -ge "$retries" ]]; then
  echo "the run was started $((retries + 1)) times: giving up" >&2
  exit "$status"
fi
if [[ "$status" == 143 ]]; then reason="the time is up"; else reason="a host did not come"; fi
echo "$reason; job $SLURM_JOB_ID goes back to the queue" >&2
scontrol requeue "$SLURM_JOB_ID"
# Slurm ends this script.
sleep 60
exit "$status"
