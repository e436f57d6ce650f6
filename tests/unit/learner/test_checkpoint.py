"""A checkpoint is whole or absent, and restores every bit."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from model_families import save_random_model
from peft import PeftModel
from real_engine import make_tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from syncline.config.schema import Lora, Model, Optimizer
from syncline.errors import CheckpointError
from syncline.learner.checkpoint import Checkpoints, TrainState
from syncline.learner.model import load_model, trainable_parameters
from syncline.learner.optim import SplitMasterAdamW


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


class Trained:
    """A model and its optimizer after a few steps of made-up gradients."""

    def __init__(self, path: Path, *, steps: int, lora: Lora | None = None, dtype: str = "bfloat16") -> None:
        self.model = load_model(Model(path=str(path), dtype=dtype, lora=lora), device=torch.device("cpu"))
        self.optimizer = SplitMasterAdamW(trainable_parameters(self.model), Optimizer())
        self.step(steps)

    def step(self, count: int) -> None:
        for _ in range(count):
            for _, parameter in trainable_parameters(self.model):
                parameter.grad = torch.randn_like(parameter)
            self.optimizer.step(1e-4)

    def bits(self) -> dict[str, torch.Tensor]:
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return weights | {name: t.clone() for name, t in self.optimizer.state_dict().items()}


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_a_resumed_run_continues_to_the_bit(model_path: Path, tmp_path: Path, lora: Lora | None) -> None:
    checkpoints = Checkpoints(tmp_path, 2, model_path)
    torch.manual_seed(1)
    first = Trained(model_path, steps=3, lora=lora)
    checkpoints.save(TrainState(3, 3, 100), first.model, first.optimizer, digest="abc")
    first.step(3)

    torch.manual_seed(2)  # another adapter start, another random state: the checkpoint must bring its own
    second = Trained(model_path, steps=1, lora=lora)
    newest = checkpoints.newest()
    assert newest is not None
    assert checkpoints.load(newest, second.model, second.optimizer) == (TrainState(3, 3, 100), "abc")
    second.step(3)
    expected = first.bits()
    assert all(torch.equal(expected[name], tensor) for name, tensor in second.bits().items())


def test_the_newest_is_the_one_of_the_highest_step_whatever_it_is_called(model_path: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, model_path, name="step_{step}")
    trained = Trained(model_path, steps=1)
    for step in (9, 10, 11):
        checkpoints.save(TrainState(step, step), trained.model, trained.optimizer, digest="")
    (tmp_path / "step_old").mkdir()
    (tmp_path / "step_99.partial").mkdir()
    assert checkpoints.newest_step() == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_11", "step_99.partial", "step_old"]


def test_loading_writes_into_the_parameters_own_memory(model_path: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, model_path)
    trained = Trained(model_path, steps=1)
    path = checkpoints.save(TrainState(1, 1), trained.model, trained.optimizer, digest="")
    addresses = [p.data_ptr() for p in trained.model.parameters()]
    trained.step(1)
    checkpoints.load(path, trained.model, trained.optimizer)
    assert [p.data_ptr() for p in trained.model.parameters()] == addresses


def test_a_full_checkpoint_is_a_hugging_face_model(model_path: Path, tmp_path: Path) -> None:
    trained = Trained(model_path, steps=1)
    path = Checkpoints(tmp_path, 2, model_path).save(TrainState(1, 1), trained.model, trained.optimizer, digest="")
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trained.model.parameters(), strict=True))


def test_an_adapter_checkpoint_is_a_peft_adapter(model_path: Path, tmp_path: Path) -> None:
    trained = Trained(model_path, steps=2, lora=Lora(rank=2))
    path = Checkpoints(tmp_path, 2, model_path).save(TrainState(2, 2), trained.model, trained.optimizer, digest="")
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    loaded = dict(PeftModel.from_pretrained(base, path).named_parameters())
    for name, parameter in trainable_parameters(trained.model):
        torch.testing.assert_close(loaded[name], parameter.detach(), rtol=0, atol=0)


def test_a_half_written_checkpoint_is_none(model_path: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, model_path)
    trained = Trained(model_path, steps=1)
    checkpoints.save(TrainState(1, 1), trained.model, trained.optimizer, digest="")
    (tmp_path / "step-000002.partial").mkdir()
    assert checkpoints.newest_step() == 1


@contextmanager
def room_for_files_of(num_bytes: int) -> Iterator[None]:
    """What a write beyond it meets is what it meets on a full disk: an error of the operating system."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "rng.safetensors"])
def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(model_path: Path, tmp_path: Path, file: str) -> None:
    checkpoints = Checkpoints(tmp_path, 2, model_path)
    trained = Trained(model_path, steps=1)
    saved = checkpoints.save(TrainState(1, 1), trained.model, trained.optimizer, digest="")
    trained.step(1)
    limit = room_for_files_of((saved / file).stat().st_size - 1)
    with limit, pytest.raises(CheckpointError, match=r"step-000002\.partial: cannot be written: .*make room"):
        checkpoints.save(TrainState(2, 2), trained.model, trained.optimizer, digest="")
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    checkpoints.load(saved, trained.model, trained.optimizer)


def test_only_the_newest_are_kept(model_path: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, model_path)
    trained = Trained(model_path, steps=1)
    for step in (8, 9, 10, 11):
        checkpoints.save(TrainState(step, step), trained.model, trained.optimizer, digest="")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-000011"]


def test_a_name_may_have_any_characters(model_path: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1, model_path, name="s[1]*?-{step:06d}")
    trained = Trained(model_path, steps=1)
    for step in (1, 2):
        checkpoints.save(TrainState(step, step), trained.model, trained.optimizer, digest="")
    assert checkpoints.newest_step() == 2
    assert [path.name for path in tmp_path.iterdir()] == ["s[1]*?-000002"]


@pytest.mark.parametrize("file", ["model", "optimizer", "rng"])
def test_a_file_that_was_cut_off_is_a_checkpoint_that_cannot_be_resumed_from(
    model_path: Path, tmp_path: Path, file: str
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, model_path)
    trained = Trained(model_path, steps=1)
    path = checkpoints.save(TrainState(1, 1), trained.model, trained.optimizer, digest="")
    whole = (path / f"{file}.safetensors").read_bytes()
    (path / f"{file}.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be re"):
        checkpoints.load(path, trained.model, trained.optimizer)


@pytest.mark.parametrize("fault", ["another shape", "no optimizer", "cut state"])
def test_what_does_not_fit_is_named(model_path: Path, tmp_path: Path, fault: str) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, model_path)
    trained = Trained(model_path, steps=1)
    path = checkpoints.save(TrainState(1, 1), trained.model, trained.optimizer, digest="")
    expected = {"another shape": "model.embed_tokens.weight", "no optimizer": "optimizer", "cut state": "state.json"}[
        fault
    ]
    if fault == "another shape":
        trained = Trained(make_tiny_model(tmp_path / "other", hidden_size=64), steps=1)
    elif fault == "no optimizer":
        (path / "optimizer.safetensors").unlink()
    else:
        (path / "state.json").write_text('{"step": 1')
        expected = "cannot be resumed from"
    with pytest.raises(CheckpointError, match=expected):
        checkpoints.load(path, trained.model, trained.optimizer)


def test_experts_are_saved_as_files_name_them_and_resumed_from(tmp_path: Path) -> None:
    """transformers keeps them fused in memory; engines, and everybody else, read the names of the files."""
    path = save_random_model("mixtral", tmp_path / "model")
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, path)
    first, second = Trained(path, steps=2), Trained(path, steps=0)
    folder = checkpoints.save(TrainState(2, 2, 10), first.model, first.optimizer, digest="abc")
    assert "model.layers.1.block_sparse_moe.experts.3.w1.weight" in load_file(folder / "model.safetensors")
    checkpoints.load(folder, second.model, second.optimizer)
    expected = first.bits()
    assert all(torch.equal(expected[name], tensor) for name, tensor in second.bits().items())
