"""Samples as TRL 1.16's colocate mode does: vLLM in this process, one request a completion, logprobs as it reads them.

    python benchmarks/trl_sampling.py MODEL PROMPTS.json MAX_TOKENS REPEATS MAX_NUM_SEQS cuda|cpu

Prints the seconds of each round as JSON (`sampling.py` reads it). The settings are those of `trl.generation`.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any


def engine(model: str, *, max_length: int, max_num_seqs: int, on_gpu: bool) -> Any:
    from vllm import LLM

    options: dict[str, Any] = {"distributed_executor_backend": "external_launcher", "gpu_memory_utilization": 0.3}
    if not on_gpu:
        options = {"kv_cache_memory_bytes": 1 << 30, "enforce_eager": True, "dtype": "float32"}
    return LLM(
        model=model,
        max_model_len=max_length,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=4096,
        logprobs_mode="processed_logprobs",
        seed=0,
        **options,
    )


def logprobs(outputs: list[Any]) -> tuple[list[Any], list[Any]]:
    """As TRL's `extract_logprobs`: every position's, sorted by rank, and their tokens."""
    values, tokens = [], []
    for output in outputs:
        for one in output.outputs:
            rows = [sorted(row.items(), key=lambda item: item[1].rank) for row in one.logprobs]
            values.append([[entry.logprob for _, entry in row] for row in rows])
            tokens.append([[token for token, _ in row] for row in rows])
    return values, tokens


def main() -> int:
    model, prompts, max_tokens, repeats, max_num_seqs, device = sys.argv[1:]
    token_ids = json.loads(Path(prompts).read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone, VLLM_LOGGING_LEVEL="WARNING", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    from vllm import SamplingParams

    length = len(token_ids[0]) + int(max_tokens)
    llm = engine(model, max_length=length, max_num_seqs=int(max_num_seqs), on_gpu=device == "cuda")
    asked = [{"prompt_token_ids": prompt} for prompt in token_ids]
    seconds, num_tokens = [], 0
    for tokens in (min(32, int(max_tokens)), *[int(max_tokens)] * int(repeats)):
        params = SamplingParams(n=1, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=tokens, logprobs=0)
        start = time.perf_counter()
        outputs = llm.generate(asked, sampling_params=params, use_tqdm=False)
        logprobs(outputs)
        seconds.append(time.perf_counter() - start)
        num_tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    print(json.dumps({"num_tokens": num_tokens, "seconds": seconds[1:]}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
