#!/usr/bin/env bash
# The rollout servers alone, in front, until Ctrl-C:
#   recipes/rollout_servers/servers.sh server_gpus=0,1,2,3,4,5 config=configs/rollout_servers.yaml
set -euo pipefail
source "$(dirname "$0")/variables.sh"
exec syncline serve "${words[@]}"
