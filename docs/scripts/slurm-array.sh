#!/bin/bash
# A harvest as a job array: sbatch slurm-array.sh. Each task has one GPU and harvests its share, in any order.
#SBATCH --job-name=harvest
#SBATCH --array=0-63
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail

export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
model=${MODEL:-google/gemma-2-2b}
out=${OUT:-s3://bucket/pile}
tasks=${SLURM_ARRAY_TASK_COUNT:-64}

# exec: the signal of a preemption then reaches sae, which stops with every finished window safe.
exec sae harvest --model "$model" --layer "${LAYER:-12}" --tokens "${TOKENS:-100M}" --out "$out" \
    --share "$((SLURM_ARRAY_TASK_ID + 1))/$tasks"
