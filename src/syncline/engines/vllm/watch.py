"""What ends an engine whose core is gone, or hangs behind a server that still answers.

Requests inside wait for the core, and nothing but their clients' deadlines would end them. As the process ends they are
sent away: the pool asks other engines, no task is charged with them, and whoever watches the process starts it again,
`engine.max_restarts` times, or names it.
"""

import asyncio

from syncline.engines.vllm.served import Served

WATCH_SECONDS = 0.5
PROBE_SECONDS = 5.0
LEAST_PATIENCE_SECONDS = 60.0
"""A step may take so long on a busy machine, with kernels that are compiled in it."""


async def fault_of_core(served: Served, *, request_seconds: float) -> str:
    """Waits until the core is gone (vLLM's own watchdog takes five seconds), or has answered nothing for half of what a
    request has, the other half being another engine's; says which. While its workers do what a bridge asked, such as
    loading weights, it answers nothing else: that is no silence. Seconds are counted by this process's turns, so that
    one that was itself stopped draws no conclusion.
    """
    patience = max(LEAST_PATIENCE_SECONDS, request_seconds / 2)
    engine, silent = served.engine, 0.0
    probe = asyncio.gather(engine.is_paused(), return_exceptions=True)
    while not engine.errored:
        await asyncio.sleep(WATCH_SECONDS)
        silent = 0.0 if served.num_asked else silent + WATCH_SECONDS
        if probe.done() and silent >= PROBE_SECONDS:
            probe, silent = asyncio.gather(engine.is_paused(), return_exceptions=True), 0.0
        elif not probe.done() and silent > patience:
            return f"the engine core has not answered for {patience:g} s"
    return str(getattr(engine, "dead_error", "the engine core ended"))
