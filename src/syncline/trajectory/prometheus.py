"""GET /metrics: the queue's counters, the run's newest step and this process, as Prometheus reads them.

The engine's own /metrics stays vLLM's. Nothing is counted here: each scrape reads the queue as `/status` does.
"""

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from syncline.observe.files import newest_object
from syncline.observe.sinks import METRICS_FILE
from syncline.trajectory.queue import TrajectoryQueue
from syncline.trajectory.status import QueueStatus, queue_status
from syncline.trajectory.store import TrajectoryStore
from syncline.trajectory.turns import Turns

_HELD = {
    "permits": "out with environments that sample",
    "queued": "waiting to be trained on",
    "leased": "being trained on",
    "consumed": "trained on, not yet in a checkpoint",
}
_OF_AN_ENVIRONMENT = {
    "weight": "share asked for, relative to the others",
    "num_permits": "groups being sampled",
    "num_queued": "groups waiting",
    "num_to_retry": "tasks to be handed out again",
    "seconds_since_heard": "since its last word to this process",
}


def add_metrics_route(app: FastAPI, store: TrajectoryStore) -> None:
    turns: Turns = app.state.turns

    @app.get("/metrics")
    async def metrics() -> Response:
        status, stored = await turns.take(lambda queue: _read(queue, store))
        step = await asyncio.to_thread(newest_object, store.path.parent / METRICS_FILE)
        return Response(exposition(status, stored_bytes=stored, step=step or {}), media_type=CONTENT_TYPE_LATEST)


def _read(queue: TrajectoryQueue, store: TrajectoryStore) -> tuple[QueueStatus, int]:
    return queue_status(queue), store.stored_bytes()


def exposition(status: QueueStatus, *, stored_bytes: int, step: Mapping[str, Any]) -> bytes:
    """`step` is the newest line of `metrics.jsonl`; names such as `sync/pause_seconds` become a label."""
    registry = CollectorRegistry()
    registry.register(_Scrape([*_queue(status), *_environments(status), *_store(stored_bytes), _step(step)]))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Scrape(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def _queue(status: QueueStatus) -> Iterator[Metric]:
    for name in ("policy_version", "step", "capacity"):
        yield GaugeMetricFamily(f"syncline_{name}", f"{name} as GET /status has it", value=getattr(status, name))
    held = GaugeMetricFamily("syncline_groups", f"groups held; {_HELD}", labels=["state"])
    for state in _HELD:
        held.add_metric([state], getattr(status, f"num_{state}"))
    yield held
    for name, count in status.counters.items():
        yield CounterMetricFamily(f"syncline_{name}", f"{name}, since the run began", value=count)
    yield GaugeMetricFamily("syncline_batch_ready", "1: the learner could lease a batch", value=not status.why_waiting)


def _environments(status: QueueStatus) -> Iterator[Metric]:
    granted = CounterMetricFamily("syncline_environment_granted", "permits granted", labels=["environment"])
    for name, one in status.environments.items():
        granted.add_metric([name], one.num_granted)
    yield granted
    for field, meaning in _OF_AN_ENVIRONMENT.items():
        family = GaugeMetricFamily(
            f"syncline_environment_{field.removeprefix('num_')}", meaning, labels=["environment"]
        )
        for name, one in status.environments.items():
            if (value := getattr(one, field)) is not None:
                family.add_metric([name], value)
        yield family


def _store(stored_bytes: int) -> Iterator[Metric]:
    yield GaugeMetricFamily("syncline_store_bytes", "of the store on disk that are in use", value=stored_bytes)


def _step(step: Mapping[str, Any]) -> Metric:
    family = GaugeMetricFamily("syncline_run", "the newest step's metrics, by their names", labels=["metric"])
    for name, value in step.items():
        if isinstance(value, int | float):
            family.add_metric([name], value)
    return family
