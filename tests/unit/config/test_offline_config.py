"""The pipeline file: every fault by its field, all at once."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from syncline.config.offline import engine_run, load_offline
from syncline.errors import ConfigError

ROOT = Path(__file__).parents[3]


def write(folder: Path, **changes: Any) -> Path:
    rows = {"name": "sums", "made": {}}
    values: dict[str, Any] = {
        "run": {"dir": "runs/x"},
        "model": {"path": "m", "lora": {"rank": 8}},
        "collect": {"questions": rows},
        "eval": {"sets": [rows]},
    }
    for field, value in changes.items():
        *parents, last = field.split("__")
        here = values
        for parent in parents:
            here = here.setdefault(parent, {})
        here[last] = value
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(values))
    return folder / "pipeline.yaml"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model__lora": None}, "model.lora: absent, and DPO trains an adapter"),
        ({"model__lora": {"target_modules": ["lm_head"]}}, "model.lora.target_modules: lm_head cannot be adapted"),
        ({"bridge__name": "shared"}, "bridge.name: 'shared' moves no adapter between rounds; use lora or restart"),
        ({"model__lora": {"dora": True}}, "model.lora.dora: true gives rows magnitudes"),
        ({"dpo__pairs_per_step": 6}, "dpo.microbatch_pairs: 4 does not divide pairs_per_step = 6"),
        ({"dpo__losses": {"sft": 1.0}}, "dpo.losses: sft alone has no preference in it"),
        (
            {"dpo__losses": {"sigmod": 1.0}},
            "dpo.losses.sigmod: is none of TRL's losses that this trains: sigmoid,",
        ),
        ({"dpo__losses": {"sigmoid": 0.0}}, "dpo.losses.sigmoid: 0.0 must be > 0"),
        ({"dpo__guard": {"max_dorp": 1}}, "dpo.guard.max_dorp: unknown key (value 1); did you mean 'max_drop'?"),
        ({"eval__sets": [{"name": "a"}]}, "eval.sets.0: has no source; give exactly one of path, hub and made"),
        ({"eval__sets": [{"name": "a", "path": "x", "hub": "y"}]}, "eval.sets.0: has path and hub"),
        ({"eval__sets": [{"name": "a", "made": {}}] * 2}, "eval.sets.1.name: 'a' is taken by eval.sets.0"),
        ({"eval__format": "Answer: ("}, "eval.format: 'Answer: (' is no regular expression"),
        ({"eval__prompt": "solve"}, "eval.prompt: 'solve' has no {question} to fill in"),
        ({"eval__max_tokens": 4096}, "eval.max_tokens: 4096 leaves no room for a prompt in model.max_length = 2048"),
    ],
)
def test_a_fault_is_told_by_its_field(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_offline(write(tmp_path, **changes))
    assert any(fault.startswith(told) for fault in raised.value.faults), raised.value.faults


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load_offline(write(tmp_path, model__lora=None, dpo__pairs_per_step=6), ["eval.prompt=x"])
    assert len(raised.value.faults) == 3


def test_the_demo_is_a_pipeline_whose_engines_hold_an_adapter_beside_the_base() -> None:
    run = engine_run(load_offline(ROOT / "configs" / "offline_demo.yaml"), "elsewhere")
    assert (run.model.path, run.bridge.name) == ("elsewhere", "lora") and run.model.lora is not None
