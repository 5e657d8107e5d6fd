#!/bin/bash
# A cache in a bucket, from one machine: plan, harvest into the bucket, check the cache, train from it.
set -euo pipefail

export AWS_REGION=${AWS_REGION:-us-east-1} # credentials: AWS_ACCESS_KEY_ID and so on, or the role of the machine
cache=s3://bucket/pile

sae harvest --model google/gemma-2-2b --layer 12 --tokens 100M --out "$cache" --dry-run
sae harvest --model google/gemma-2-2b --layer 12 --tokens 100M --out "$cache"
sae cache verify "$cache"
sae train --variant topk --layer 12 --cache "$cache" --local-cache 200GB --out runs/pile
