#!/usr/bin/env bash
# Everything but the servers, which are waited for, wait_timeout seconds at most:
#   recipes/rollout_servers/train.sh server_gpus=0,1,2,3,4,5 train_gpus=6,7 config=configs/rollout_servers.yaml
set -euo pipefail
source "$(dirname "$0")/variables.sh"
exec syncline run --engines-apart "${words[@]}"
