"""The real learner on recorded rollouts: everything `syncline train` builds, but that its bridge leads nowhere.

python -m recorded_learner CONFIG TRAJECTORIES_URL [HANGS_AT]: HANGS_AT is a version whose publish never ends, so that
the learner, or a rank of it, can be killed when the step has changed weights that no checkpoint holds.
"""

import os
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from syncline.bridges.ranks import DATA_PARALLEL, Ranks
from syncline.bridges.receipt import model_digest, parameter_digests
from syncline.cli import train as verb
from syncline.cli.ranks import is_rank, run_ranks
from syncline.config import RunConfig, load
from syncline.learner.distributed import joined_ranks, num_ranks, rank_device
from syncline.learner.loop import train
from syncline.learner.model import checkpoint_wholes, learner_device
from syncline.learner.parity import ParityReport
from syncline.protocols import Receipt, SyncReport


class Nowhere:
    """A `WeightBridge` and a parity gate that agree with whatever the learner has."""

    def __init__(self, ranks: Ranks, folder: Path, hangs_at: int | None) -> None:
        self._ranks = ranks
        self._folder = folder
        self._hangs_at = hangs_at

    def attach(self, model: Any) -> None:
        """Nobody to attach to."""

    def updating(self) -> nullcontext[None]:
        return nullcontext()

    def publish(self, model: Any, *, policy_version: int) -> SyncReport:
        digest = model_digest(parameter_digests(checkpoint_wholes(model, self._ranks)))
        if policy_version == self._hangs_at:
            (self._folder / f"hangs-{self._ranks.rank}").write_text(str(os.getpid()))
            threading.Event().wait()
        return SyncReport(Receipt(policy_version, digest), 0, 0.0, 0.0)

    def check(self, model: Any, *, device: torch.device) -> ParityReport:
        return ParityReport(0.0, 0.0, 0.0, 1)

    def close(self) -> None:
        """Nothing is held."""


def main() -> int:
    file, url, *hangs = sys.argv[1:]
    config = load(file)
    if num_ranks(config.learner) > 1 and not is_rank():
        return run_ranks(num_ranks(config.learner), sys.argv[1:], module="recorded_learner")
    learn(config, url, int(hangs[0]) if hangs else None)
    return 0


def learn(config: RunConfig, url: str, hangs_at: int | None) -> None:
    device = rank_device(learner_device(config.learner.device))
    with joined_ranks(device, timeout_seconds=120, dimension=DATA_PARALLEL) as ranks:
        nowhere = Nowhere(ranks, Path(config.run.dir), hangs_at)
        with (
            patch.object(verb, "build_bridge", lambda *_, **__: nowhere),
            patch.object(verb, "_gate", lambda *_: nowhere),
            patch.object(verb, "await_servers", lambda *_: None),
            verb.assemble(config, ranks, device=device, engines=[], trajectories_url=url) as parts,
        ):
            train(config, parts)


if __name__ == "__main__":
    sys.exit(main())
