"""What `Holding` promises a pause, with vLLM's own scheduler, engine core and output processor around it: no model."""

import queue
import time
from collections import deque
from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from real_engine import make_tiny_model
from vllm import SamplingParams
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.metrics.stats import IterationStats
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from syncline.engines.vllm.holding import HELD_TOKENS
from syncline.engines.vllm.schedulers import HoldingAsyncScheduler, HoldingScheduler

NUM_REQUESTS = 3
MAX_TOKENS = 4 * HELD_TOKENS


class Executor:
    """Every request samples 1, 2, 3, …, token t with the logprob -t / 8."""

    def __init__(self) -> None:
        self._sampled: dict[str, int] = {}

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        del non_block
        self._scheduled = list(scheduler_output.num_scheduled_tokens)
        return done(None if self._scheduled else EMPTY_MODEL_RUNNER_OUTPUT)

    def collective_rpc(self, *_: Any, **__: Any) -> list[Any]:
        return []

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        del grammar_output
        for request_id in self._scheduled:
            self._sampled[request_id] = self._sampled.get(request_id, 0) + 1
        tokens = np.array([self._sampled[request_id] for request_id in self._scheduled])
        output = ModelRunnerOutput(
            req_ids=self._scheduled,
            req_id_to_index={request_id: i for i, request_id in enumerate(self._scheduled)},
            sampled_token_ids=[[int(token)] for token in tokens],
            logprobs=LogprobsLists(tokens[:, None], -tokens[:, None].astype(np.float32) / 8, tokens),
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        return done(output) if non_block else output


def done(value: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class Core(EngineCoreProc):
    """vLLM's, without what starts models and sockets."""

    def __init__(self, scheduler: Any, *, in_turn: bool) -> None:
        self.scheduler, self.model_executor = scheduler, Executor()  # pyright: ignore[reportAttributeAccessIssue]
        self.batch_queue, self.batch_queue_size = (None, 1) if in_turn else (deque(maxlen=2), 2)
        self.step_fn = self.step if in_turn else self.step_with_batch_queue
        self.aborts_queue, self.output_queue = queue.Queue(), queue.Queue()
        self.engines_running = self.check_for_draft_tokens = self.is_pooling_model = self.is_mm_encoder_only = False
        self.is_ec_consumer, self.async_scheduling, self._idle_state_callbacks = True, not in_turn, []
        self._weight_version = "0"
        self.capture_iteration_details = self.log_error_detail = lambda _: nullcontext()  # type: ignore[method-assign]
        self._attach_iteration_details = lambda *_: None  # type: ignore[method-assign]

    def until_idle(self) -> None:
        for _ in range(10):
            if not self.has_work():
                return self._notify_idle_state_callbacks()
            self._process_engine_step()
        raise AssertionError("the core does not come to rest")


class Server:
    """The other end of the core's wire: what it knows of each request, and the answers."""

    def __init__(self, core: Core) -> None:
        self._core, self._processor = core, OutputProcessor(None, log_stats=True, stream_interval=1)
        self.answers: list[Any] = []
        params = SamplingParams(
            max_tokens=MAX_TOKENS,
            logprobs=0,
            flat_logprobs=True,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for name in map(str, range(NUM_REQUESTS)):
            options: dict[str, Any] = {"prompt_token_ids": [5, 6], "sampling_params": params, "pooling_params": None}
            core.scheduler.add_request(Request(request_id=name, **options))
            rest: dict[str, Any] = {"mm_features": None, "arrival_time": time.time(), "lora_request": None}
            rest |= {"cache_salt": None, "data_parallel_rank": None, "external_req_id": name}
            collector: Any = SimpleNamespace(put=self.answers.append)
            self._processor.add_request(EngineCoreRequest(request_id=name, **options, **rest), None, None, 0, collector)

    def knows(self) -> dict[str, int]:
        while not self._core.output_queue.empty():
            _, outputs = self._core.output_queue.get()
            self._processor.process_outputs(outputs.outputs, outputs.timestamp, IterationStats())
        states = self._processor.request_states
        return {name: state.detokenizer.num_output_tokens() for name, state in states.items() if state.detokenizer}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(params=["in turn", "asynchronous"])
def core(model: str, request: pytest.FixtureRequest) -> Core:
    in_turn = request.param == "in turn"
    scheduler = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=512, is_encoder_decoder=False)
    config = VllmConfig(
        model_config=ModelConfig(model=model, dtype="float32"),
        cache_config=CacheConfig(block_size=16, enable_prefix_caching=False),
        scheduler_config=scheduler,
        device_config=DeviceConfig("cpu"),
    )
    config.scheduler_config.async_scheduling = not in_turn
    config.cache_config.num_gpu_blocks = 200
    attention = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)
    blocks = KVCacheConfig(num_blocks=200, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["one"], attention)])
    made = (HoldingScheduler if in_turn else HoldingAsyncScheduler)(
        vllm_config=config,
        kv_cache_config=blocks,
        log_stats=True,
        structured_output_manager=StructuredOutputManager(config),
        block_size=16,
    )
    return Core(made, in_turn=in_turn)


def sampled(core: Core) -> dict[str, int]:
    return {name: request.num_output_tokens for name, request in core.scheduler.requests.items()}  # type: ignore[attr-defined]


def test_a_pause_is_complete_when_the_server_knows_every_token(core: Core) -> None:
    server = Server(core)
    for _ in range(HELD_TOKENS // 2):
        core._process_engine_step()
    assert set(server.knows().values()) == {1}, "the others are held"
    paused = core.pause_scheduler(mode="keep", clear_cache=False)
    core.until_idle()
    assert paused is not None and paused.done()
    assert server.knows() == sampled(core)
    assert min(sampled(core).values()) > 1

    core.resume_scheduler()
    for _ in range(3):
        core._process_engine_step()
    for mode in ("keep", "abort"):  # as `compat.pause` aborts
        core.pause_scheduler(mode=mode, clear_cache=False)
        if mode == "keep":
            core.until_idle()
            kept = sampled(core)
    server.knows()
    assert {answer.request_id: len(answer.outputs[0].token_ids) for answer in server.answers} == kept
    assert {answer.outputs[0].finish_reason for answer in server.answers} == {"abort"}


def test_every_token_arrives_in_order_with_its_logprob(core: Core) -> None:
    server = Server(core)
    for _ in range(2 * MAX_TOKENS):
        if core.has_work():
            core._process_engine_step()
    server.knows()
    assert len(server.answers) == NUM_REQUESTS
    for answer in server.answers:
        (completion,) = answer.outputs
        assert completion.finish_reason == "length"
        assert completion.token_ids == completion.logprobs.token_ids == list(range(1, MAX_TOKENS + 1))
        assert completion.logprobs.logprobs == [-token / 8 for token in completion.token_ids]
