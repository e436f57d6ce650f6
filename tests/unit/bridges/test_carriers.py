"""How an adapter travels: the way is chosen from where the engine is, and what arrives is what was sent."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from syncline.bridges.adapter import AdapterLayout, LoraLayer
from syncline.bridges.carriers import Carrier, Receiver, Way, way_to, whereabouts
from syncline.errors import SyncError

CPU = torch.device("cpu")
LAYOUT = AdapterLayout({"q.lora_A.weight": (2, 8), "q.lora_B.weight": (6, 2)}, "bfloat16")


def fill(carrier: Carrier, value: float) -> dict[str, str]:
    ones = LoraLayer(torch.full((2, 8), value), torch.full((6, 2), value), 2.0)
    carrier.packed.pack({"q": ones})
    return carrier.packed.digests()


def arrived(receiver: Receiver, source: Mapping[str, Any]) -> dict[str, str]:
    """The digests of what a receiver reads."""
    buffer = LAYOUT.new_buffer(CPU)
    tensors = receiver.receive(source, LAYOUT)
    for name, view in LAYOUT.views(buffer).items():
        view.copy_(tensors[name])
    return LAYOUT.on(buffer).digests()


@pytest.mark.parametrize("way", ["memory", "files"])
def test_every_version_arrives_as_it_was_sent(tmp_path: Path, way: Way) -> None:
    carrier = Carrier(LAYOUT, [way], device=CPU, folder=tmp_path)
    receiver = Receiver(CPU)
    for version in range(4):
        sent = fill(carrier, float(version))
        [source] = carrier.send(version)
        assert arrived(receiver, source) == sent
    assert (len(list(tmp_path.iterdir())), way) in [(0, "memory"), (2, "files")], "the last two versions are kept"
    carrier.close()


def test_memory_of_the_same_address_as_closed_memory_is_opened_again(tmp_path: Path) -> None:
    receiver = Receiver(CPU)
    for value in (1.0, 2.0):
        carrier = Carrier(LAYOUT, ["memory"], device=CPU, folder=tmp_path)
        sent = fill(carrier, value)
        assert arrived(receiver, carrier.send(0)[0]) == sent
        carrier.close()


def test_one_buffer_reaches_engines_near_and_far(tmp_path: Path) -> None:
    carrier = Carrier(LAYOUT, ["files", "memory"], device=CPU, folder=tmp_path)
    sent = fill(carrier, 3.0)
    assert [arrived(Receiver(CPU), source) for source in carrier.send(7)] == [sent, sent]
    carrier.close()


def test_the_folder_is_an_adapter_of_scaling_one(tmp_path: Path) -> None:
    from peft import PeftConfig
    from safetensors.torch import load_file

    carrier = Carrier(LAYOUT, ["files"], device=CPU, folder=tmp_path)
    fill(carrier, 1.0)
    folder = Path(carrier.send(3)[0]["folder"])
    config = PeftConfig.from_pretrained(str(folder))
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 2, {"q"})  # type: ignore[attr-defined]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors["base_model.model.q.lora_B.weight"].unique().tolist() == [2.0]


def test_the_way_depends_on_what_two_processes_share() -> None:
    here = whereabouts(CPU)
    assert way_to([here], CPU) == "memory"
    for field in ("boot_id", "pid_namespace", "torch_version"):
        assert way_to([here, here | {field: "another"}], CPU) == "files", field
    assert way_to([here | {"device": "GPU-1"}], CPU) == "memory"


def test_one_gpus_memory_is_opened_by_ranks_on_that_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    here = whereabouts(CPU) | {"device": "GPU-0"}
    monkeypatch.setattr("syncline.bridges.carriers.whereabouts", lambda device: here)
    gpu = torch.device("cuda", 0)
    assert way_to([here], gpu) == "device"
    assert way_to([here, here | {"device": "GPU-1"}], gpu) == "memory"


def test_a_folder_the_engine_cannot_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SyncError, match=r"nowhere cannot be read by the engine.*run\.dir on a shared disk"):
        Receiver(CPU).receive({"folder": str(tmp_path / "nowhere")}, LAYOUT)


def test_memory_of_another_layout_is_refused(tmp_path: Path) -> None:
    carrier = Carrier(LAYOUT, ["memory"], device=CPU, folder=tmp_path)
    other = AdapterLayout({**LAYOUT.shapes, "v.lora_A.weight": (2, 8)}, "bfloat16")
    with pytest.raises(SyncError, match="words, its layout"):
        Receiver(CPU).receive(carrier.send(0)[0], other)
    carrier.close()
