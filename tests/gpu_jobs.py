"""What there is to run on GPUs, in pieces that need some of them each; `tests/on_gpus.py` runs them."""

from collections.abc import Iterator
from dataclasses import dataclass

from model_families import DENSE, EXPERT

FAMILY_PARTS = 7


@dataclass(frozen=True, slots=True)
class Job:
    """`arguments` are pytest's; `seconds` is about how long it takes beside ten others, where it is no engine's start
    and a few tests."""

    name: str
    num_gpus: int
    arguments: tuple[str, ...]
    seconds: int = 120
    alone: bool = False
    """Nobody else on its GPUs: vLLM measures their memory, and gives up when others let go of some meanwhile."""

    @property
    def file_name(self) -> str:
        return self.name.replace(":", "-")


def known_jobs() -> list[Job]:
    return [*_contracts(), *_others(), *_example_trainer(), *_main_jobs(), *_families()]


def _contracts() -> Iterator[Job]:
    """Every bridge with every number of engine ranks; `broadcast` has its learner on a GPU of its own."""
    suite = "tests/contracts/test_weight_bridge.py"
    for bridge, sizes in {"restart": (1, 2, 4), "broadcast": (1, 2, 4), "lora": (1, 2, 4)}.items():
        for ranks in sizes:
            name = f"{bridge}-tp{ranks}"
            yield Job(f"contract:{name}", ranks + (bridge == "broadcast"), (suite, "-k", f"[{name}"))
    for bridge, ranks in (("restart", 1), ("broadcast", 1), ("lora", 1)):
        name = f"{bridge}-pp2-tp{ranks}"
        yield Job(f"contract:{name}", 2 * ranks + (bridge == "broadcast"), (suite, "-k", f"[{name}"))
    for bridge in ("shared", "shared-lora"):
        yield Job(f"contract:{bridge}-tp1", 1, (suite, "-k", f"[{bridge}-tp1"))
    yield Job("contract:broadcast-sparse-tp2", 3, (suite, "-k", "[broadcast-sparse-tp2"))
    for ranks in (2, 4):
        yield Job(f"contract:shared-tp{ranks}", ranks, ("tests/contracts/test_shared_ranks.py", "-k", f"tp{ranks}"))


def _others() -> Iterator[Job]:
    yield Job("broadcast-kills", 3, ("tests/contracts/test_broadcast_engines.py",), 220)
    yield Job("chaos", 2, ("tests/contracts/test_weight_chaos.py",), 170)
    yield Job("broadcast-ranks", 3, ("tests/contracts/test_broadcast_ranks.py",))
    yield Job("adapter-ranks", 2, ("tests/contracts/test_lora_ranks.py",))
    yield Job("replicas", 1, ("tests/contracts/test_replicas.py",))
    yield Job("adapters", 1, ("tests/contracts/test_lora_engine.py",))
    for part, chosen in {"int4": "gptq or awq", "others": "w4a16 or fp8"}.items():
        yield Job(f"packed:{part}", 2, ("tests/contracts/test_packed_engine.py", "-k", chosen), 220)
    kernels = ("learner", "broadcast", "sinks")
    yield Job("kernels", 1, tuple(f"tests/gpu/test_{name}_on_cuda.py" for name in kernels), 90)
    yield Job("layers", 1, ("tests/gpu/test_layers_on_cuda.py",), 90)
    for num_gpus, (name, chosen) in enumerate({"one": "one", "two": "two or another"}.items(), 1):
        yield Job(f"resume:{name}", num_gpus, ("tests/gpu/test_resume_on_cuda.py", "-k", chosen), 300)
    yield Job("shared-start", 1, ("tests/contracts/test_shared_start.py",))
    yield Job("restart-process", 1, ("tests/e2e/test_engine_restart.py",), 140)
    yield Job("learner-apart", 1, ("tests/e2e/test_learner_apart.py",), 140)
    yield Job("prefix-cache", 1, ("tests/contracts/test_prefix_cache.py",))
    yield Job("conversations", 1, ("tests/e2e/test_conversations.py",))
    yield Job("images", 2, ("tests/contracts/test_images.py", "tests/e2e/test_summary_run.py"), 300)
    yield Job("offline", 2, ("tests/e2e/test_offline.py", "tests/e2e/test_collect.py"), 280)
    yield Job("recovery", 1, ("tests/e2e/test_recovery.py",), 450)
    yield Job("gpt-oss", 1, ("tests/contracts/test_gpt_oss_engine.py", "tests/gpu/test_sinks_on_cuda.py"))
    yield Job("gpt-oss-run", 1, ("tests/e2e/test_gpt_oss_job.py",), 220)


def _example_trainer() -> Iterator[Job]:
    """A job a mode, the longest first: each starts vLLM as often as it says, which takes most of its time."""
    for mode, test in {"none": "legacy", "lora_only": "lora", "shared_vllm": "single_copy"}.items():
        yield Job(f"example-trainer:{mode}", 1, ("tests/e2e/test_example_trainer.py", "-k", test), 200, alone=True)


def _main_jobs() -> Iterator[Job]:
    """The main job from start to report through each bridge."""
    for variant, num_gpus in {
        "restart": 1,
        "restart-lora": 1,
        "shared": 1,
        "shared-lora": 1,
        "lora": 1,
        "lora-gptq": 1,
        "broadcast-lora": 2,
        "broadcast-fsdp2": 3,
        "shared-tp2": 2,
        "shared-tp4": 4,
    }.items():
        yield Job(f"main:{variant}", num_gpus, ("tests/e2e/test_main_job.py", "-k", f"[{variant}]"), 140)


def _families() -> Iterator[Job]:
    names = [*DENSE, *EXPERT]
    for part in range(FAMILY_PARTS):
        chosen = " or ".join(f"[{name}]" for name in names[part::FAMILY_PARTS])
        yield Job(f"families:{part + 1}", 1, ("tests/e2e/test_families.py", "-k", chosen), 170)
