# Read by the scripts beside it. server_gpus, train_gpus, config and wait_timeout come from the environment or as words;
# every other word (a.b=c) is a field set over the file's.
overrides=()
for word in "$@"; do
  refused=
  case $word in
    server_gpus=* | train_gpus=* | config=* | wait_timeout=*) declare "$word" ;;
    server_log=*) refused="logs are in run.dir, the servers' in run.dir with -servers behind it; set run.dir" ;;
    wait_interval=*) refused="the servers are asked ever less often by itself; leave it out" ;;
    debug=*) refused="leave it out; every process logs in run.dir, and parity and memory are always told" ;;
    train_env=*) refused="set variables before the command: NCCL_DEBUG=INFO $0 ..." ;;
    force_kill_port=*) refused="nothing of others is killed; the error names the pid that holds the port" ;;
    *) overrides+=("$word") ;;
  esac
  [[ -z $refused ]] || { echo "$word: $refused" >&2; exit 2; }
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
