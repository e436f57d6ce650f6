"""Every difference between the vLLM versions we serve with, and the refusal of the others.

Supported: 0.26 (torch 2.11) to 0.33. vLLM 0.27 moved the server's parts from `entrypoints.openai` to
`entrypoints.launchers`, and 0.28 taught the engine to name its weights' version.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from syncline.errors import EngineError

OLDEST, NEWEST = (0, 26), (0, 33)


@dataclass(frozen=True, slots=True)
class ServerParts:
    """The functions vLLM's own server is made of."""

    build_engine_client: Callable[..., Any]
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
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.entrypoints.launchers.launcher import serve_http, setup_server
    except ImportError:
        from vllm.entrypoints.launcher import serve_http  # pyright: ignore[reportMissingImports]
        from vllm.entrypoints.openai.api_server import (
            build_app,
            build_async_engine_client,
            init_app_state,
            setup_server,
        )
        from vllm.entrypoints.openai.cli_args import (  # pyright: ignore[reportMissingImports]
            make_arg_parser,
            validate_parsed_serve_args,
        )
    return ServerParts(
        build_engine_client=build_async_engine_client,
        build_app=build_app,
        init_app_state=init_app_state,
        serve_http=serve_http,
        setup_server=setup_server,
        make_arg_parser=make_arg_parser,
        validate_args=validate_parsed_serve_args,
    )


async def name_weights(engine: Any, policy_version: int) -> None:
    """Tells vLLM the version too, so that its own token-in/token-out route reports it; 0.26 has no such call."""
    if hasattr(engine, "update_weight_version"):
        await engine.update_weight_version(str(policy_version))


async def drop_caches(engine: Any) -> None:
    """Forgets every KV block: vLLM's prefix cache does not know the version of the weights that filled it."""
    if await engine.reset_prefix_cache() is False:
        raise EngineError("vLLM kept its prefix cache: requests still hold blocks of the old weights")
    await engine.reset_mm_cache()
