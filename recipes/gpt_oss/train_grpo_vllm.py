"""GPT-OSS by GRPO against a vLLM server that runs already: environment variables and flags → our configuration.

    syncline serve configs/gpt_oss_20b.yaml --port 8000           # one GPU
    python recipes/gpt_oss/train_grpo_vllm.py                     # another; Ctrl-C saves what is trained

The variables are those of TRL's scripts: VLLM_SERVER_HOST, VLLM_SERVER_PORT or VLLM_SERVER_BASE_URL say where the
server is, VLLM_TENSOR_PARALLEL_SIZE how many GPUs it has, ATTN_IMPLEMENTATION (or ATTN_IMPL) what the learner's
attention is computed by, where that can be had here. GRPO_LOG_COMPLETIONS=0 leaves the completions' CSV out,
GRPO_COMPLETION_LOG_PATH names it.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from syncline.cli import main as syncline

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "gpt_oss_20b.yaml"
WAITS = "request_timeout_seconds: 590, start_timeout_seconds: 900"
"""All that is left of the file's engine: the server has the other settings, and was started with them."""
COMPLETIONS = "runs/micro_step_completions.csv"
IGNORED = {
    "GRPO_TRUNCATION_THRESHOLD": "a completion is cut off when the engine says so; sampling.max_tokens sets the limit",
    "GRPO_STEPS_PER_GENERATION": "run.groups_per_step and learner.token_budget say what a step learns from",
    "VLLM_USE_V1": "vLLM has no other engine any more",
    "VLLM_FLASH_ATTN_VERSION": "belongs to the server: set it for `syncline serve`",
    "VLLM_ATTENTION_BACKEND": "belongs to the server: set it for `syncline serve`",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Train GPT-OSS with GRPO against a running vLLM server.")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in run.dir")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in run.dir and start over")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="fields set over the file's")
    args = parser.parse_args()
    for name in sorted(IGNORED.keys() & os.environ.keys()):
        print(f"{name} is not used: {IGNORED[name]}", file=sys.stderr)
    again = ["--resume"] * args.resume + ["--overwrite"] * args.overwrite
    return syncline(["run", str(args.config), *overrides(os.environ), *args.overrides, *again])


def overrides(variables: Mapping[str, str]) -> list[str]:
    """The variables as fields."""
    host, port = variables.get("VLLM_SERVER_HOST", "localhost"), variables.get("VLLM_SERVER_PORT", "8000")
    url = variables.get("VLLM_SERVER_BASE_URL") or f"http://{host}:{port}"
    ranks = variables.get("VLLM_TENSOR_PARALLEL_SIZE", "1")
    fields = [f"engine={{servers: [{{url: {url}, tensor_parallel_size: {ranks}}}], {WAITS}}}"]
    if attention := variables.get("ATTN_IMPLEMENTATION") or variables.get("ATTN_IMPL"):
        fields.append(f"learner.attention={attention},auto")
    if variables.get("GRPO_LOG_COMPLETIONS", "1") != "0":
        fields.append(f"observe.completions_csv={variables.get('GRPO_COMPLETION_LOG_PATH', COMPLETIONS)}")
    return fields


if __name__ == "__main__":
    sys.exit(main())
