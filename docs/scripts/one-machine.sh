#!/bin/bash
# Eight GPUs of one machine: harvest, train and evaluate, each on all of them.
set -euo pipefail

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} # threads of each process; torchrun would set 1
cache=activations/pile
launch=(torchrun --standalone --nproc_per_node 8 -m sae)

"${launch[@]}" harvest --model google/gemma-2-2b --layer 12 --tokens 100M --out "$cache"
"${launch[@]}" train --cache "$cache" --layer 12 --variant topk --variant jumprelu --seed 0 --seed 1 --seed 2 --out runs/sweep
"${launch[@]}" evaluate runs/sweep/*
