#!/bin/bash
#SBATCH --job-name=tiny
#SBATCH --dependency=singleton
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=4:00:00
#SBATCH --partition=gpu
#SBATCH --account=lm
#SBATCH --reservation=night
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
#SBATCH '--output=/data/checkout/runs/a b.log'
#SBATCH --chdir=/data/checkout
#SBATCH --qos=high
#SBATCH '--constraint=a|b'

export PYTHONUNBUFFERED=1
export NAME='it'"'"'s'
module load cuda

# By scancel, scontrol requeue or preemption; the run is told by Slurm itself.
stopped=
trap 'stopped=1' TERM
max_restarts=3
echo "launch: start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"
srun --label --kill-on-bad-exit=0 --wait=300 --cpu-bind=none --container-image=registry/jax:25 python3 -m t5x_like train --config=configs/pretrain/tiny.py --config.loop.steps=100 '--workdir=runs/a b'
status=$?

again() {
  echo "launch: status $status, $1; starts again"
  scontrol requeue "$SLURM_JOB_ID"
}

# The number of faults is kept by Slurm, in the comment of the job, since a script starts anew each time.
faults=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%k)
faults=${faults#faults=}
case $faults in '' | *[!0-9]*) faults=0 ;; esac
if [ "$status" -eq 0 ]; then
  echo 'launch: done'
elif [ -n "$stopped" ]; then
  echo "launch: status $status, stopped by Slurm, which says what follows"
elif [ "$status" -eq 75 ]; then
  again 'saved'
elif [ "$status" -eq 2 ]; then
  echo "launch: status $status, wrong use, which no restart helps"
elif [ "$faults" -lt "$max_restarts" ]; then
  scontrol update JobId="$SLURM_JOB_ID" Comment="faults=$((faults + 1))"
  again "fault $((faults + 1)), of which $max_restarts are followed by a restart"
else
  echo "launch: status $status, fault $((faults + 1)); no restart is left of $max_restarts"
fi
exit "$status"
