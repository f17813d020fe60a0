#!/usr/bin/env bash
# Train on several GPU hosts under Slurm: one process per host, with all of its GPUs. Set the lines below to your cluster's
# and your run's, then: sbatch scripts/slurm_train.sh --config configs/tiny.py --workdir /shared/runs/tiny --config.data.root=...
#
# The workdir must lie on a file system that all hosts share. 2 minutes before the time limit, and when the job is
# preempted, the run gets SIGTERM, saves one checkpoint, and the job goes back into the queue: it goes on from there.
#SBATCH --job-name=msvmamba
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

cd "${SLURM_SUBMIT_DIR:?submit this with sbatch from the project\'s folder}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR-$HOME/.cache/msvmamba_jax}"  # compile once, not for each start

srun --kill-on-bad-exit=1 .venv/bin/python -m msvmamba_jax.train "$@" &
trap 'kill -TERM $!' TERM  # Slurm signals this script (B:); srun passes it on to every process
wait $!
status=$?
if [ "$status" -gt 128 ]; then  # interrupted by the signal: the processes are saving
    wait $!
    status=$?
fi
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
