# Read by the scripts beside it. server_gpus, train_gpus, config and wait_timeout come from the environment or as words;
# every other word (a.b=c) is a field set over the file's.
overrides=()
for word in "$@"; do
  case $word in
    server_gpus=* | train_gpus=* | config=* | wait_timeout=*) declare "$word" ;;
    *) overrides+=("$word") ;;
  esac
done
: "${config:?name the run: config=configs/rollout_servers.yaml}"
words=(--config "$config")
[[ -z ${server_gpus:-} ]] || words+=("engine.devices=[$server_gpus]")
if [[ -n ${train_gpus:-} ]]; then
  IFS=, read -ra gpus <<<"$train_gpus"
  words+=("learner.devices=[$train_gpus]" "learner.data_parallel_size=${#gpus[@]}")
fi
[[ -z ${wait_timeout:-} ]] || words+=("engine.start_timeout_seconds=$wait_timeout")
words+=("${overrides[@]}")
