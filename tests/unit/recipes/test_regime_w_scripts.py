"""The original's scripts of merging, DPO and evaluation: its flags, files, fields and banners over our stages."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from real_engine import make_tiny_model

from syncline.config.load import validated
from syncline.config.offline import OfflineConfig
from syncline.config.schema import Lora, Model
from syncline.errors import ConfigError
from syncline.learner.model import load_model

RECIPES = Path(__file__).parents[3] / "recipes" / "regime_w"


def script(name: str) -> dict:
    return runpy.run_path(str(RECIPES / f"{name}.py"))


def test_merge_lora_says_what_the_guide_says_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, merged = make_tiny_model(tmp_path / "base", hidden_size=64), tmp_path / "merged"
    adapted = load_model(Model(path=str(base), lora=Lora(rank=2)), device=torch.device("cpu"))
    adapted.save_pretrained(tmp_path / "lora")
    flags = ["--base_model", str(base), "--lora_path", str(tmp_path / "lora"), "--output_path", str(merged)]
    monkeypatch.setattr(sys, "argv", ["merge_lora.py", *flags, "--dtype", "float32"])
    assert script("merge_lora")["main"]() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["=" * 80, "LoRA Merge for vLLM Optimization"]
    assert lines[-3:] == ["LoRA merge complete!", f"Merged model saved to: {merged}", "=" * 80]
    assert f"  LoRA adapter: {tmp_path / 'lora'}" in lines and "Merging LoRA weights into base model..." in lines
    assert sorted(path.suffix for path in merged.glob("model*")) == [".json", ".safetensors"]
    assert script("merge_lora")["main"]() == 2, "a folder that is there is not overwritten"


def test_dpo_reads_the_records_of_phase_3_under_one_prompt(tmp_path: Path) -> None:
    converted = script("train_dpo_coherence")["converted"]
    path = tmp_path / "preferences.jsonl"
    record = {"question": "3 + 4?", "gold_answer": "#### 7", "chosen": "#### 7", "rejected": "#### 8"}
    path.write_text(json.dumps(record) + "\n")
    [found] = converted(path)
    assert found["prompt"][0]["content"].endswith("\n\nProblem:\n3 + 4?\n\nSolution:\n")
    assert (found["chosen"][0]["content"], found["rejected"][0]["content"]) == ("#### 7", "#### 8")
    path.write_text(json.dumps({**record, "chosen": None}) + "\n")
    with pytest.raises(ConfigError, match=r"preferences\.jsonl:1: field 'chosen' is missing"):
        converted(path)


def test_dpo_on_several_ranks_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(sys, "argv", ["train_dpo_coherence.py"])
    assert script("train_dpo_coherence")["main"]() == 2
    assert "WORLD_SIZE: 8" in capsys.readouterr().err


def test_the_evaluation_is_greedy_of_256_tokens_read_as_the_original_read(tmp_path: Path) -> None:
    from argparse import Namespace

    asked = Namespace(out_path=tmp_path / "o.jsonl", base_model="m", data_path="d", max_new_tokens=256, max_length=1280)
    asked.lora_rank = 16
    config = validated(OfflineConfig, script("eval_abel_coherence_platinum")["values"](asked))
    assert (config.eval.max_tokens, config.eval.num_samples, config.eval.answers) == (256, 0, "v8")
    assert "'#### 42'" in config.eval.prompt
