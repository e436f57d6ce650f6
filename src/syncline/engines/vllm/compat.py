"""Every difference between the vLLM versions we serve with, and the refusal of the others.

Supported: 0.26 (torch 2.11) to 0.33. vLLM 0.27 moved the server's parts from `entrypoints.openai` to
`entrypoints.launchers`, and 0.28 taught the engine to name its weights' version.
"""

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from syncline.errors import EngineError, EngineTimeout

SETTLE_SECONDS = 30.0
OLDEST, NEWEST = (0, 26), (0, 33)


@dataclass(frozen=True, slots=True)
class ServerParts:
    """The functions vLLM's own server is made of."""

    build_app: Callable[..., Any]
    init_app_state: Callable[..., Any]
    serve_http: Callable[..., Any]
    setup_server: Callable[..., Any]
    make_arg_parser: Callable[..., Any]
    validate_args: Callable[..., Any]


def vllm_version() -> str:
    """The installed version. Raises `EngineError` when it is missing or not one we support."""
    try:
        import vllm
    except ImportError as error:
        raise EngineError(f"vLLM cannot be imported ({error}); run `make setup`") from error
    version = vllm.__version__
    major_minor = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if not OLDEST <= major_minor <= NEWEST:
        raise EngineError(
            f"vLLM {version} is not supported; install {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
        )
    return version


def server_parts() -> ServerParts:
    vllm_version()
    try:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.entrypoints.launchers.launcher import serve_http, setup_server
    except ImportError:
        from vllm.entrypoints.launcher import serve_http  # pyright: ignore[reportMissingImports]
        from vllm.entrypoints.openai.api_server import build_app, init_app_state, setup_server
        from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args  # pyright: ignore
    return ServerParts(build_app, init_app_state, serve_http, setup_server, make_arg_parser, validate_parsed_serve_args)


def keep_messages_whole() -> None:
    """Has the engine core put its arrays into a message's first part, where vLLM takes the buffer of that part for its
    next message as soon as the *last* one has gone (0.26 does): what the server then reads is two messages mixed, which
    it mostly cannot decode, and the engine dies. Before the core is started."""
    from vllm.v1.engine.core import EngineCoreProc

    if not hasattr(EngineCoreProc, "_send_msg_tracking_payload"):
        os.environ["VLLM_MSGPACK_ZERO_COPY_THRESHOLD"] = str(1 << 30)  # bytes from which on an array is a part


def core_died() -> type[Exception]:
    """What vLLM raises in every request once its engine core has died."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return EngineDeadError


def gpu_bytes() -> int:
    """Of the first GPU that this process sees; asks the driver, so that nothing is allocated there."""
    from vllm.platforms import current_platform

    return current_platform.get_device_total_memory()


async def name_weights(engine: Any, policy_version: int) -> None:
    """Tells vLLM the version too, so that its own token-in/token-out route reports it; 0.26 has no such call."""
    if hasattr(engine, "update_weight_version"):
        await engine.update_weight_version(str(policy_version))


async def pause(engine: Any, mode: str, *, reuse_kv: bool = False) -> None:
    """Stops the engine core at a token boundary. `mode`: requests inside end by themselves (`"drain"`), end aborted, or
    freeze (`"keep"`): with `reuse_kv` as they are, otherwise to be computed again from their first token.

    What `pause_generation` does, less the 20 ms it then sleeps to let outputs arrive: the gate knows when they have.
    """
    freezes = mode == "keep" and engine.output_processor.has_unfinished_requests()
    sees = engine.model_config.is_multimodal_model
    kept_elsewhere = engine.vllm_config.kv_transfer_config is not None  # blocks that are not told apart by weights
    clear_cache = (freezes and not reuse_kv) or kept_elsewhere
    mode = "wait" if mode == "drain" else mode
    core = engine.engine_core
    if mode == "abort":  # once frozen, the core has let go of what it held (`holding.py`): an abort would drop it
        await core.pause_scheduler_async(mode="keep", clear_cache=False)
    await core.pause_scheduler_async(mode=mode, clear_cache=clear_cache and not sees)
    if sees:
        await _forget_what_was_seen(core, clear_cache=clear_cache or freezes)


async def _forget_what_was_seen(core: Any, *, clear_cache: bool) -> None:
    """KV blocks are told apart by the weights that filled them (`door.py`); what a vision tower made of an image is
    found by the image alone, so it goes. A frozen request may be half way through one, so it begins anew.

    Not by `clear_cache` of the pause: that drops the pixels the core holds as well, which no weights made, and the
    front end, which sends each image once, then names one that the core no longer has: the request fails.
    """
    if clear_cache:
        await core.reset_prefix_cache_async(reset_running_requests=True, reset_connector=True)
    await core.reset_encoder_cache_async()


def can_freeze(*, seed: int | None) -> bool:
    """Whether a request may be frozen and go on. A frozen request is computed again from its first token, and vLLM
    then rewinds a seeded request's random generator, which torch's CPU generator cannot: the engine core would die."""
    from vllm.platforms import current_platform

    return seed is None or not current_platform.is_cpu()


async def sampled_tokens(engine: Any) -> dict[str, dict[int, int]]:
    """Request id → index of the completion → tokens sampled, for every unfinished completion of a paused engine.

    The pause's answer followed the last outputs through one socket, so they have arrived; they are counted once the
    task that processes them waits for more. vLLM's own version spans (0.28 and later) are counted in the same place.
    """
    states = engine.output_processor.request_states
    queue = engine.engine_core.outputs_queue
    deadline = time.monotonic() + SETTLE_SECONDS
    while states and not (queue.empty() and queue._getters):
        if engine.errored:
            raise EngineError("the engine core died while requests were frozen")
        if time.monotonic() > deadline:
            raise EngineTimeout(f"vLLM has not taken in the frozen requests' last tokens in {SETTLE_SECONDS:g} s")
        await asyncio.sleep(0)
    sampled: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for state in states.values():
        request_id = state.parent_req.external_req_id if state.parent_req else state.external_req_id
        if state.detokenizer is not None:
            sampled[request_id][state.request_index] = state.detokenizer.num_output_tokens()
    return dict(sampled)


def make_stage_inputs(model_runner: Any) -> None:
    """What a later stage of a pipeline takes its inputs in. vLLM makes it in a warm-up, which its CPU build leaves out
    where nothing is compiled; the stage's first request would then fail."""
    from vllm.distributed import get_pp_group

    if model_runner.intermediate_tensors is None and not get_pp_group().is_first_rank:
        model_runner.intermediate_tensors = model_runner.model.make_empty_intermediate_tensors(
            batch_size=model_runner.max_num_tokens, dtype=model_runner.model_config.dtype, device=model_runner.device
        )


def adapter_manager(model_runner: Any) -> Any:
    """vLLM's `LRUCacheLoRAModelManager`, which owns the slots; private, and the same in every supported version."""
    return model_runner.lora_manager._adapter_manager


def new_adapter(adapter_id: int, pairs: Mapping[str, list[tuple[Any, Any]]]) -> Any:
    """vLLM's `LoRAModel` of module → (A, B), B scaled: no file and no configuration is read. Fused experts have a pair
    for each of their matrices, with an expert's in each row."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    layers = {}
    for name, found in pairs.items():
        rank = found[0][0].shape[-2]
        a, b = found[0] if len(found) == 1 else map(list, zip(*found, strict=True))
        layers[name] = LoRALayerWeights(name, rank, rank, a, b, scaling=1.0)  # pyright: ignore[reportArgumentType]
    return LoRAModel(adapter_id, max((layer.rank for layer in layers.values()), default=1), layers)
