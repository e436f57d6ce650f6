"""vLLM's own layers without its processes: one of them believes that it is any rank of several."""

from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def on_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Makes vLLM's layers believe that this process is one rank of several."""
    import vllm.distributed
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    def become(rank: int, num_ranks: int) -> None:
        for module in (vllm.distributed, linear, vocab_parallel_embedding, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: num_ranks)

    with set_current_vllm_config(VllmConfig()):
        yield become
