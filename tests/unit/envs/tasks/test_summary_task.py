"""Every reward by an example worked by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from syncline.envs.tasks.summary import Summary
from syncline.envs.tasks.summary_reading import IRRELEVANT, Category, Reading, Schema
from syncline.envs.tasks.summary_rewards import rewards
from syncline.errors import ConfigError

HEADER = "<DOMAIN=BBU>, <TASK=SUMMARY>"
CABLE = {"类别": "电线", "捆扎": {"整齐": 2, "散乱": 1}, "可见性": {"完整": 3}}
LABEL = {"类别": "标签", "文本": {"A1": 1, "B2": 1}}
REFERENCE = {"统计": [CABLE, LABEL], "备注": ["无法判断"]}
SCHEMA = Schema(
    frozenset({"统计", "备注"}),
    {
        "电线": Category(frozenset({"捆扎"}), allowed=frozenset({"捆扎", "可见性"})),
        "标签": Category(required_any=(frozenset({"文本", "可见性"}),)),
    },
)


def scored(answer: Any, reference: Any = REFERENCE, *, header: str = HEADER, domain: str = "BBU", **more: Any) -> dict:
    said = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    text = f"{header}\n{said}" if header else said
    meant = reference if isinstance(reference, str) else json.dumps(reference, ensure_ascii=False)
    return rewards(Reading.of(text, meant, domain=domain, schema=SCHEMA, **more))


def test_the_reference_itself_is_worth_everything() -> None:
    assert scored(REFERENCE) == {
        "format": 1, "header": 1, "strict": 0, "parse": 0, "no_dup_keys": 0, "dataset": 1, "category_recall": 1,
        "category_f1": 1, "attr_key_recall": 1, "attr_path_recall": 1, "schema_tree": 1,
        "content_structured_tversky": 1, "content_f1": 1, "content_eq": 1, "text_bbu": 1, "notes_bbu": 1,
        "notes_presence": 1, "group_stats_presence": 1,
    }  # fmt: skip


def test_order_is_nothing() -> None:
    turned = {"备注": ["无法判断"], "统计": [dict(reversed(LABEL.items())), CABLE]}
    assert scored(turned)["content_eq"] == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{HEADER}\n{{}}", {"format": 1, "header": 1, "strict": 0, "parse": 0, "dataset": 1}),
        (f"{HEADER}\n{{}}\nmore", {"format": 0, "header": 1, "strict": -1, "parse": 0, "dataset": 0}),
        ("{}", {"format": 0, "header": 0, "strict": -1, "parse": -1, "dataset": 0}),
        (f"{HEADER}\n{{'a'}}", {"format": 1, "header": 1, "strict": 0, "parse": -1, "dataset": 0}),
        ("<DOMAIN=RRU>, <TASK=SUMMARY>\n{}", {"format": 1, "header": 0, "strict": -1, "parse": 0, "dataset": 0}),
        ("<DOMAIN=X>, <TASK=SUMMARY>\n{}", {"format": 0, "header": 0, "strict": -1, "parse": 0, "dataset": 0}),
        ("", {"format": 0, "header": 0, "strict": -1, "parse": -1, "dataset": 0}),
        (f"{HEADER}\n[1]", {"format": 0, "header": 1, "strict": 0, "parse": 0, "dataset": 0}),
    ],
)
def test_the_form_of_an_answer(text: str, expected: dict[str, float]) -> None:
    found = scored(text, header="")
    assert {name: found[name] for name in expected} == expected


def test_a_key_twice_anywhere_is_punished() -> None:
    assert scored('{"统计": [{"类别": "电线", "类别": "标签"}]}')["no_dup_keys"] == -1
    assert scored('{"统计": [], "统计": []}')["no_dup_keys"] == -1


def test_irrelevant_pictures_have_one_answer() -> None:
    assert scored(IRRELEVANT, IRRELEVANT, header="")["format"] == 1
    wrong = scored({}, IRRELEVANT)
    assert (wrong["format"], wrong["header"]) == (0, -1)
    assert not any(value for name, value in wrong.items() if name != "header"), "nothing else speaks of such a picture"


@pytest.mark.parametrize("category", ["5", "true", '["电线"]', "{}"])
def test_a_category_that_is_no_text_is_another_one(category: str) -> None:
    assert scored(f'{{"统计": [{{"类别": {category}, "捆扎": {{"整齐": 1}}}}]}}')["category_recall"] == 0


def test_numbers_of_any_length_are_scored() -> None:
    counted = scored('{"统计": [{"类别": "电线", "捆扎": {"整齐": 1' + "0" * 400 + "}}]}")
    assert 0 < counted["content_structured_tversky"] < 1e-9
    assert scored('{"统计": ' + "9" * 5_000 + "}")["parse"] == -1


def test_rows_of_another_kind_are_worth_nothing() -> None:
    assert not any(scored("nonsense", header="", dense=True).values())


def test_recalls() -> None:
    # 电线 has one of its two attributes; 标签, of whose only attribute 文本 nobody is asked, does not count
    one = scored({"统计": [{"类别": "电线", "捆扎": {"整齐": 2}}, {"类别": "光纤"}]})
    assert one["category_recall"] == pytest.approx(1 / 2)
    assert one["category_f1"] == pytest.approx(1 / 2)  # 1 shared, 1 too many, 1 too few
    assert one["attr_key_recall"] == pytest.approx(1 / 2)
    assert one["attr_path_recall"] == pytest.approx(1 / 3)  # of 整齐, 散乱 and 完整
    assert scored({"统计": [LABEL]})["attr_path_recall"] == 0


def test_values_that_were_read_off_are_not_asked_for() -> None:
    reference = {"统计": [{"类别": "电线", "位置": {"12": 1, "a=b": 1, "x" * 33: 1, "左": 1}, "品牌": {"华为": 1}}]}
    assert scored({"统计": [{"类别": "电线", "位置": {"左": 1}}]}, reference)["attr_path_recall"] == 1


def test_content() -> None:
    # facts: 整齐 2 (said 1), 散乱 1 (said 3), 完整 3 (said 3), a note (not said), texts A1 and B2 (A1 said)
    cable = {"类别": "电线", "捆扎": {"整齐": 1, "散乱": 3}, "可见性": {"完整": 3}}
    found = scored({"统计": [cable, {"类别": "标签", "文本": {"A1": 1}}]})
    assert found["content_structured_tversky"] == pytest.approx(5 / (5 + 0.30 * 2 + 1 * 1))
    assert found["content_f1"] == pytest.approx(2 * 6 / (2 * 6 + 2 + 3))
    assert found["content_eq"] == 0
    rru = scored({"统计": [cable]}, header="<DOMAIN=RRU>, <TASK=SUMMARY>", domain="RRU")
    assert rru["content_structured_tversky"] == pytest.approx(5 / (5 + 0.60 * 2 + 1 * 3))  # texts count there


def test_texts_may_be_a_few_too_many() -> None:
    def texts(**read: int) -> float:
        return scored({"统计": [{"类别": "标签", "文本": read}]})["text_bbu"]

    assert texts(A1=1) == 1 / 2
    assert texts(A1=1, B2=1, C=1, D=1) == 1
    assert texts(A1=1, B2=1, C=1, D=1, E=1, F=1) == pytest.approx(1 - 2 * 0.1)
    assert texts(**{f"x{i}": 1 for i in range(30)}) == -1
    assert scored(REFERENCE, domain="RRU")["text_bbu"] == 0


def test_notes_and_groups() -> None:
    without = {"统计": [CABLE, LABEL]}
    assert scored(without)["notes_bbu"] == 0
    assert scored(REFERENCE, without)["notes_bbu"] == -1
    assert (scored(without)["notes_presence"], scored(without, without)["notes_presence"]) == (0, 1)
    grouped = {**without, "分组统计": {"一组": 2}}
    assert scored(without, grouped)["group_stats_presence"] == 0
    assert scored(grouped, grouped)["content_eq"] == 1
    assert scored({**without, "分组统计": {"一组": 1}}, grouped)["content_eq"] == 0


def test_schema_tree() -> None:
    full = scored({"统计": [CABLE, LABEL]})["schema_tree"]
    assert full == 1
    # 电线 lacks 捆扎 and has one attribute beyond the two it may have; one category and one key too many
    worse = {"统计": [{"类别": "电线", "颜色": {"红": 1}}, LABEL, {"类别": "门"}], "标题": 1}
    assert scored(worse)["schema_tree"] == pytest.approx((0 + 1) / 2 - 0.35 * (1 / 2) / 2 - 0.25 * 1 / 2 - 0.30 * 1 / 2)
    assert scored({"统计": [{"类别": "门"}]})["schema_tree"] == 0


def test_distances_of_rru_are_digits() -> None:
    schema = Schema(frozenset({"统计"}), {"站点距离": Category(frozenset({"站点距离"}))})

    def found(distance: Any) -> float:
        said = {"统计": [{"类别": "站点距离", "站点距离": distance}]}
        meant = json.dumps({"统计": [{"类别": "站点距离", "站点距离": {"13": 1}}]})
        text = f"<DOMAIN=RRU>, <TASK=SUMMARY>\n{json.dumps(said)}"
        return rewards(Reading.of(text, meant, domain="RRU", schema=schema))["schema_tree"]

    assert found({"12": 1}) == 1
    assert found({"12m": 1}) == pytest.approx(0.4)
    assert found("12") == pytest.approx(0.4)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(b"a picture")
    row = {
        "images": ["a.png"],
        "summary": json.dumps(REFERENCE),
        "metadata": {"_fusion_template": "bbu_summary", "_fusion_mode": "summary"},
    }
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path


def test_the_environment_shows_the_row_and_weighs_the_parts(rows: Path) -> None:
    environment = Summary(path=str(rows), weights={"format": 1.5, "attr_key_recall": 3.0})
    task = environment.task(0)
    [message] = environment.prompt(task)
    assert [image.path for image in message.images] == [str(rows.parent / "a.png")]
    score = environment.score(task, f"{HEADER}\n" + json.dumps({"统计": [{**CABLE, "类别": "电线"}]}))
    assert score.reward == pytest.approx(1.5 * 1 + 3.0 * 1)
    assert score.parts["category_recall"] == 1 / 2


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"images": []}, "field 'images' must be"),
        ({"summary": ""}, "field 'summary' must be"),
        ({"metadata": [1]}, "field 'metadata' must be an object"),
        ({"prompt": ["x"]}, "and 'prompt' a text"),
        ({"metadata": {}}, "metadata says no domain"),
        ({"images": ["gone.png"]}, "gone.png: cannot be read"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(rows: Path, change: dict[str, Any], fault: str) -> None:
    rows.write_text(json.dumps(json.loads(rows.read_text()) | change))
    with pytest.raises(ConfigError, match=fault):
        Summary(path=str(rows), weights={"format": 1.0})


def test_what_cannot_be_weighed_is_named(rows: Path) -> None:
    with pytest.raises(ConfigError, match="weights"):
        Summary(path=str(rows), weights={"formatt": 1.0})
    with pytest.raises(ConfigError, match=r"weights\.schema_tree needs it"):
        Summary(path=str(rows), weights={"schema_tree": 1.0})
