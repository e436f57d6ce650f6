#!/usr/bin/env bash
# Servers and learner of one machine; whatever ends it, both end:
#   recipes/rollout_servers/both.sh server_gpus=0,1,2,3,4,5 train_gpus=6,7 config=configs/rollout_servers.yaml
set -euo pipefail
source "$(dirname "$0")/variables.sh"
exec syncline run "${words[@]}"
