#!/usr/bin/env bash
# Workers of one study as a SLURM array: every task runs the same command, and any number of them may come and go.
#
#   umask 077; echo 'postgresql+psycopg://USER:PASSWORD@HOST/DATABASE' > ~/.mergefront-storage
#   sbatch studies/cluster/slurm.sh /shared/studies/my-study.yaml
#
# Edit the lines below for your site. Tasks that are preempted or whose node fails are queued again by SLURM; one that
# runs out of time gives its trial back and queues itself again. The study is complete, its report split scored, when
# the array has ended; submitting it again is harmless.

#SBATCH --job-name=mergefront
#SBATCH --array=0-7
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
#SBATCH --output=mergefront-%A_%a.log

set -euo pipefail

study=${1:?usage: sbatch slurm.sh STUDY.yaml}
url_file=${MERGEFRONT_STORAGE_FILE:-$HOME/.mergefront-storage}
[[ $(stat -L -c %a "$url_file") == [46]00 ]] || { echo "error: $url_file: holds a password. chmod 600 it." >&2; exit 2; }

# The environment, not the command line: arguments are seen by everybody on the node.
MERGEFRONT_STORAGE=$(<"$url_file")
export MERGEFRONT_STORAGE
# On the shared file system: what models answered is read by all workers, and by report and export.
export MERGEFRONT_EVIDENCE=${MERGEFRONT_EVIDENCE:-$PWD/runs}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# On the node: the parents are copied there once, for all tasks on it.
local_parents=${MERGEFRONT_LOCAL_PARENTS:-${TMPDIR:-/tmp}/mergefront-$(id -un)}

# In the background, so that this shell gets the signal while it waits, and hands it on.
mergefront launch "$study" --local-parents "$local_parents" &
worker=$!
trap 'signalled=yes; kill -TERM "$worker" 2>/dev/null || true' TERM INT
signalled=yes
while [[ $signalled ]]; do # a signal ends the wait, too: the trial is being given back then
  signalled=
  code=0
  wait "$worker" || code=$?
done

# Out of time rather than cancelled: go on in another allocation.
left=$((${SLURM_JOB_END_TIME:-0} - $(date +%s)))
if ((code == 143 && left > 0 && left <= 180)); then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
