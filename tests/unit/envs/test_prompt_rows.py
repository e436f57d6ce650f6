"""A row's images reach the model: at the place that the prompt names, or the row is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from syncline.envs.adapters.trl_rewards import TrlRewards
from syncline.envs.rows import prompt_row
from syncline.errors import ConfigError
from syncline.observe.images import image_ref
from syncline.types import Message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def said(folder: Path, prompt: Any, images: Any = ()) -> list[tuple[str, str, list[str]]]:
    row = prompt_row({"prompt": prompt, "images": images}, f"{folder}/rows.jsonl:1")
    return [(m.role, m.content, [Path(image.path).name for image in m.images]) for m in row.messages]


SYSTEM = {"role": "system", "content": "Be short."}
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "what is this?"}
OF_ITS_OWN = {"type": "image", "image": "b.png"}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("prompt", "images"),
    [
        ("what is this?", ["a.png", "b.png"]),
        ("<image><image>what is this?", ["a.png", "b.png"]),
        ([user("what is this?")], ["a.png", "b.png"]),
        ([user([IMAGE, IMAGE, TEXT])], ["a.png", "b.png"]),
        ([user([IMAGE, OF_ITS_OWN, TEXT])], ["a.png"]),
        ([user([IMAGE, OF_ITS_OWN, TEXT])], "a.png"),
    ],
)
def test_images_stand_before_the_text(folder: Path, prompt: Any, images: Any) -> None:
    assert said(folder, prompt, images) == [("user", "what is this?", ["a.png", "b.png"])]


def test_each_message_gets_the_images_that_it_calls_for(folder: Path) -> None:
    turns = [SYSTEM, user([IMAGE, TEXT]), {"role": "assistant", "content": "a cat"}, user("<image>and this?")]
    assert [images for _, _, images in said(folder, turns, ["a.png", "b.png"])] == [[], ["a.png"], [], ["b.png"]]
    assert [images for _, _, images in said(folder, [SYSTEM, user("both?")], ["a.png", "b.png"])] == [
        [],
        ["a.png", "b.png"],
    ]


def test_a_text_without_images_is_left_as_it_is(folder: Path) -> None:
    assert said(folder, "what does <image> mean in HTML?") == [("user", "what does <image> mean in HTML?", [])]


@pytest.mark.parametrize(
    ("prompt", "images", "fault"),
    [
        ([user([TEXT, IMAGE])], ["a.png"], "an image stands after a text; put it before"),
        ("what is <image>?", ["a.png"], "an image stands after a text"),
        ([user([{"type": "video"}])], [], "a part of type 'video' is not shown"),
        ([user(5)], [], r"field 'prompt' must be a text or a list of {role, content}"),
        ([user([IMAGE, TEXT])], [], "field 'images' has None where the prompt calls for a path"),
        ("what?", [{"bytes": "AA=="}], "field 'images' has {'bytes': 'AA=='} where the prompt calls for a path"),
        ([user([IMAGE, TEXT])], ["a.png", "b.png"], "nothing in the prompt calls for 'b.png'"),
        ("what?", ["c.png"], "c.png: cannot be read"),
    ],
)
def test_what_cannot_be_shown_is_refused(folder: Path, prompt: Any, images: Any, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        said(folder, prompt, images)


def test_rows_of_reward_functions_are_told_apart_by_their_images(folder: Path) -> None:
    for name in ("a", "b"):
        row = {"prompt": "what is this?", "images": [f"{name}.png"]}
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    files = {"path": str(folder / "a.jsonl"), "heldout_path": str(folder / "b.jsonl")}
    environment = TrlRewards(rewards=["builtins:len"], **files)
    shown = Message("user", "what is this?", (image_ref(folder / "a.png"),))
    assert environment.task(0).messages == (shown,)
    assert environment.task(0, split="heldout").messages != (shown,)
    (folder / "b.png").write_bytes(b"a.png")
    with pytest.raises(ConfigError, match="1 questions are training rows too, such as 'what is this"):
        TrlRewards(rewards=["builtins:len"], **files).task(0, split="heldout")
