#!/bin/bash
# Training on four nodes of eight GPUs: sbatch slurm-nodes.sh. The runs are assigned to 32 processes.
#SBATCH --job-name=train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail

export OMP_NUM_THREADS=8
# export GLOO_SOCKET_IFNAME=ib0 # if the nodes' names resolve to an interface that the other nodes cannot reach
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

exec srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node 8 \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:29500" \
    -m sae train --cache s3://bucket/pile --local-cache 1TB --local-folder /local/chunks --layer 12 \
    --variant topk --variant batchtopk --variant jumprelu --seed 0 --seed 1 --seed 2 --out /shared/runs
