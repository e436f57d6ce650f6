"""`syncline serve`: vLLM's own OpenAI server with our routes and worker extension, in this process.

The process may replace itself: asked to restart, it shuts vLLM down and executes its own command again with the new
checkpoint, so its pid, and whoever watches it, stay the same.
"""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from syncline.bridges.bridge_file import write_bridge_file
from syncline.config import RunConfig
from syncline.engines.vllm import compat
from syncline.engines.vllm.adapter_routes import adapter_routes, by_hand_routes
from syncline.engines.vllm.adapters import Adapters
from syncline.engines.vllm.arguments import Start, engine_device, parse, set_environment
from syncline.engines.vllm.bridge_routes import bridge_routes
from syncline.engines.vllm.broadcast_routes import broadcast_routes
from syncline.engines.vllm.door import engine_behind
from syncline.engines.vllm.gate import Gate
from syncline.engines.vllm.gated import GatedEngine
from syncline.engines.vllm.generate_routes import generate_routes
from syncline.engines.vllm.one_copy import owning
from syncline.engines.vllm.plugin import refuse_unregistered
from syncline.engines.vllm.routes import add_routes
from syncline.engines.vllm.sampling_routes import sampling_routes
from syncline.engines.vllm.served import Restart, Served
from syncline.engines.vllm.watch import fault_of_core
from syncline.engines.vllm.weight_routes import pause_routes, weight_routes
from syncline.launch.plan import url

GRACE_SECONDS = 10
"""For requests that are still answered when the server ends; then they are cut off."""


def _say(line: str) -> None:
    print(line, flush=True)


def serve(
    config: RunConfig, start: Start, *, run_dir: Path | None, argv: list[str], say: Callable[[str], None] = _say
) -> int:
    """Serves until SIGTERM; returns the exit code. `argv` is the command of `syncline` that serves so, for a restart;
    `say` takes the lines for people."""
    refuse_unregistered()
    device, shares = engine_device(config), config.bridge.name == "shared"
    set_environment(config, device)
    args = parse(config, device, start)
    compat.keep_messages_whole()
    about = {
        "name": "vllm",
        "version": compat.vllm_version(),
        "device": _device_name(device),
        "model": config.model.path,
    }
    listen_address, sock = compat.server_parts().setup_server(args, reuse_port=False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio forgets it here: 40 ms an answer
    try:
        with owning(start.port) if shares and not start.attach_to else nullcontext():
            restart, died = asyncio.run(_serve(config, args, sock, start, about, run_dir, say=say))
    finally:
        sock.close()
    if restart is not None:
        os.execv(sys.executable, _restarted(argv, restart))
    if died:
        print(f"engine at {listen_address} died: {died}", file=sys.stderr, flush=True)
        return 3
    return 0


async def _serve(
    config: RunConfig,
    args: Namespace,
    sock: Any,
    start: Start,
    about: dict[str, str],
    run_dir: Path | None,
    *,
    say: Callable[[str], None],
) -> tuple[Restart | None, str | None]:
    parts = compat.server_parts()
    died: list[str] = []
    gate = Gate(start.policy_version)
    async with engine_behind(gate, args) as engine:
        adapters = Adapters(args.max_loras if args.enable_lora else 0)
        served = Served(engine, gate, about, shares=config.bridge.name == "shared", adapters=adapters)
        app = parts.build_app(args, await engine.get_supported_tasks(), engine.model_config)
        await parts.init_app_state(GatedEngine(served), app.state, args, await engine.get_supported_tasks())
        if start.bridge_config:
            await _write_bridge_file(served, start, args, say)
        if served.num_stages > 1:
            await served.each_rank("syncline_stage_inputs")
        served.handed = (await served.each_rank("syncline_handed"))[0]
        if start.policy_version >= 0:
            await compat.name_weights(engine, start.policy_version)
            pause = served.gate.close()
            await compat.pause(engine, "abort")
            served.gate.freeze(pause)
        await served.remeasure()
        weights = (weight_routes, broadcast_routes, adapter_routes, by_hand_routes, bridge_routes)
        routes = (sampling_routes, generate_routes, pause_routes, *weights)
        add_routes(app, *(router(served) for router in routes))
        if run_dir is not None:
            (run_dir / "engine.json").write_text(json.dumps(about | {"started": time.time()}))
        watch = asyncio.create_task(_watch(served, died, config.engine.request_timeout_seconds))
        announcement = asyncio.create_task(_announce(args.host, start.port, say))
        waits = {"timeout_keep_alive": 30, "timeout_graceful_shutdown": GRACE_SECONDS}
        shutdown = await parts.serve_http(
            app, sock=sock, host=args.host, port=args.port, log_level="warning", access_log=False, **waits
        )
        served.gate.shut()
        watch.cancel()
        announcement.cancel()
    with suppress(asyncio.CancelledError):
        await shutdown
    return served.restart_from, died[0] if died else None


async def _write_bridge_file(served: Served, start: Start, args: Namespace, say: Callable[[str], None]) -> None:
    """For a learner that is started apart. Raises `SyncError`."""
    assert start.bridge_config
    handles = await served.each_rank("syncline_export")
    path = write_bridge_file(
        start.bridge_config, url=_own_url(args.host, start.port), model=served.about["model"], handles=handles
    )
    say(f"Exported {sum(len(rank['storages']) for rank in handles)} IPC handles for single-copy mode")
    say(f"Exported {len(handles[0]['tensors'])} params to {path}")


def _own_url(host: str, port: int) -> str:
    """Where this host reaches this server."""
    return url("127.0.0.1" if host in ("0.0.0.0", "::") else host, port)


async def _announce(host: str, port: int, say: Callable[[str], None]) -> None:
    """Says where it listens as soon as it does; uvicorn, which was given the socket, does not."""
    address = urlsplit(_own_url(host, port))
    while True:
        try:
            _, writer = await asyncio.open_connection(address.hostname, address.port)
        except OSError:
            await asyncio.sleep(0.05)
            continue
        writer.close()
        return say(f"Uvicorn running on {url(host, port)}")


async def _watch(served: Served, died: list[str], request_seconds: float) -> None:
    """Ends the process when its engine core is of no use any more."""
    died.append(await fault_of_core(served, request_seconds=request_seconds))
    os.kill(os.getpid(), signal.SIGTERM)


def _restarted(argv: list[str], weights: Restart) -> list[str]:
    """This command again, with the checkpoint to start from in place of any earlier one."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word in ("--checkpoint", "--policy-version"):
            next(words)
        else:
            kept.append(word)
    extra = ["--checkpoint", weights.path, "--policy-version", str(weights.policy_version)]
    return [sys.executable, "-m", "syncline", *kept, *extra]


def _device_name(device: str) -> str:
    import torch

    return "cpu" if device == "cpu" else torch.cuda.get_device_name(0)
