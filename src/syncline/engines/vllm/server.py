"""`syncline serve`: vLLM's own OpenAI server with our routes and worker extension, in this process.

The process may replace itself: asked to restart, it shuts vLLM down and executes its own command again with the new
checkpoint, so its pid, and whoever watches it, stay the same.
"""

import asyncio
import json
import os
import socket
import sys
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

from syncline.bridges.bridge_file import write_bridge_file
from syncline.config import RunConfig
from syncline.engines.vllm import compat
from syncline.engines.vllm.adapter_routes import adapter_routes, by_hand_routes
from syncline.engines.vllm.adapters import Adapters
from syncline.engines.vllm.arguments import Start, engine_device, parse, set_environment
from syncline.engines.vllm.broadcast_routes import broadcast_routes
from syncline.engines.vllm.door import engine_behind
from syncline.engines.vllm.gate import Gate
from syncline.engines.vllm.gated import GatedEngine
from syncline.engines.vllm.generate_routes import generate_routes
from syncline.engines.vllm.plugin import refuse_unregistered
from syncline.engines.vllm.routes import add_routes
from syncline.engines.vllm.sampling_routes import sampling_routes
from syncline.engines.vllm.served import Restart, Served
from syncline.engines.vllm.weight_routes import pause_routes, weight_routes
from syncline.launch.plan import url

WATCH_SECONDS = 0.5


def serve(config: RunConfig, start: Start, *, run_dir: Path | None, argv: list[str]) -> int:
    """Serves until SIGTERM; returns the exit code. `argv` is this process's command, for a restart."""
    refuse_unregistered()
    device = engine_device(config)
    set_environment(config, device)
    args = parse(config, device, start)
    about = {
        "name": "vllm",
        "version": compat.vllm_version(),
        "device": _device_name(device),
        "model": config.model.path,
    }
    listen_address, sock = compat.server_parts().setup_server(args, reuse_port=False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio forgets it here: 40 ms an answer
    try:
        restart, died = asyncio.run(_serve(args, sock, start, about, run_dir, shares=config.bridge.name == "shared"))
    finally:
        sock.close()
    if restart is not None:
        os.execv(sys.executable, _restarted(argv, restart))
    if died:
        print(f"engine at {listen_address} died: {died}", file=sys.stderr, flush=True)
        return 3
    return 0


async def _serve(
    args: Namespace, sock: Any, start: Start, about: dict[str, str], run_dir: Path | None, *, shares: bool
) -> tuple[Restart | None, str | None]:
    parts = compat.server_parts()
    died: list[str] = []
    gate = Gate(start.policy_version)
    async with engine_behind(gate, args) as engine:
        adapters = Adapters(args.max_loras if args.enable_lora else 0)
        served = Served(engine, gate, about, shares=shares, adapters=adapters)
        app = parts.build_app(args, await engine.get_supported_tasks(), engine.model_config)
        await parts.init_app_state(GatedEngine(served), app.state, args, await engine.get_supported_tasks())
        if shares and not start.attach_to:
            await served.each_rank("syncline_share")
        if start.bridge_config:
            await _write_bridge_file(served, start, args)
        served.handed = (await served.each_rank("syncline_handed"))[0]
        await served.remeasure()
        if start.policy_version >= 0:
            await compat.name_weights(engine, start.policy_version)
            await served.gate.close()
            await compat.pause(engine, "abort")
            served.gate.freeze()
        weights = (weight_routes, broadcast_routes, adapter_routes, by_hand_routes)
        routes = (sampling_routes, generate_routes, pause_routes, *weights)
        add_routes(app, *(router(served) for router in routes))
        if run_dir is not None:
            (run_dir / "engine.json").write_text(json.dumps(about | {"started": time.time()}))
        watch = asyncio.create_task(_watch(engine, died))
        shutdown = await parts.serve_http(
            app, sock=sock, host=args.host, port=args.port, log_level="warning", access_log=False, timeout_keep_alive=30
        )
        watch.cancel()
    with suppress(asyncio.CancelledError):
        await shutdown
    return served.restart_from, died[0] if died else None


async def _write_bridge_file(served: Served, start: Start, args: Namespace) -> None:
    """For a learner that is started apart. Raises `SyncError`."""
    assert start.bridge_config
    handles = await served.each_rank("syncline_export", False)
    address = url("127.0.0.1" if args.host in ("0.0.0.0", "::") else args.host, start.port)
    path = write_bridge_file(start.bridge_config, url=address, model=served.about["model"], handles=handles)
    print(f"Exported {len(handles[0]['tensors'])} params to {path}", flush=True)


async def _watch(engine: Any, died: list[str]) -> None:
    """Ends the process at once when the engine core is gone; vLLM's own watchdog takes five seconds."""
    import signal

    while True:
        await asyncio.sleep(WATCH_SECONDS)
        if engine.errored:
            died.append(str(getattr(engine, "dead_error", "the engine core ended")))
            os.kill(os.getpid(), signal.SIGTERM)
            return


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
    if device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(0)
