"""A small data set of drawn pictures and their summaries: `python scripts/summary_dataset.py data/summary`.

A picture shows cables, tidy or crossing, labels with letters on them, and boxes of which some are cut off by the edge;
one in eight shows nothing of the sort. Its summary counts what was drawn. Written are `train.jsonl`, `heldout.jsonl`,
`schema.json` and the pictures; the same seed draws the same.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SIDE = 224
DOMAINS = ("bbu", "rru")
IRRELEVANT = "无关图片"
PROMPT = (
    "Sum up the picture in two lines: <DOMAIN={domain}>, <TASK=SUMMARY>, then one JSON object that counts what is seen "
    "under 统计 by 类别; or say 无关图片."
)
SCHEMA = {
    "top": ["统计"],
    "categories": {
        "电线": {"required": ["捆扎"]},
        "标签": {"required": ["文本"], "allowed": ["可见性"]},
        "机柜": {"required": ["可见性"]},
    },
}


def drawn(rng: random.Random) -> tuple[Image.Image, dict[str, Any] | None]:
    """A picture and what is on it; nothing, of one that shows nothing."""
    picture = Image.new("RGB", (SIDE, SIDE), (235, 235, 228))
    pen = ImageDraw.Draw(picture)
    if rng.random() < 1 / 8:
        for _ in range(6):
            x, y = rng.randrange(SIDE), rng.randrange(SIDE)
            pen.ellipse((x, y, x + 40, y + 40), fill=tuple(rng.randrange(256) for _ in range(3)))
        return picture, None
    cables = Counter(_cable(pen, rng) for _ in range(rng.randint(1, 3)))
    boxes = Counter(_box(pen, rng) for _ in range(rng.randint(0, 2)))
    labels = Counter(_label(pen, rng) for _ in range(rng.randint(1, 2)))
    seen = [{"类别": "电线", "捆扎": dict(cables)}, {"类别": "标签", "文本": dict(labels)}]
    return picture, {"统计": [*seen, *([{"类别": "机柜", "可见性": dict(boxes)}] if boxes else [])]}


def _cable(pen: ImageDraw.ImageDraw, rng: random.Random) -> str:
    y, colour = rng.randrange(20, 90), rng.choice(["red", "blue", "black"])
    tidy = rng.random() < 0.5
    for i in range(3):
        ends = (y + 6 * i, y + 6 * i) if tidy else (y + 6 * i, y + 40 - 18 * i)
        pen.line((10, ends[0], SIDE - 10, ends[1]), fill=colour, width=3)
    return "整齐" if tidy else "散乱"


def _box(pen: ImageDraw.ImageDraw, rng: random.Random) -> str:
    whole = rng.random() < 0.5
    x = rng.randrange(20, SIDE - 80) if whole else SIDE - 30
    pen.rectangle((x, 110, x + 60, 200), outline="gray", width=5)
    return "完整" if whole else "部分"


def _label(pen: ImageDraw.ImageDraw, rng: random.Random) -> str:
    text = f"{rng.choice('ABC')}{rng.randrange(1, 4)}"
    x, y = rng.randrange(10, SIDE - 60), rng.randrange(130, SIDE - 30)
    pen.rectangle((x, y, x + 44, y + 22), fill="white", outline="black")
    pen.text((x + 8, y + 4), text, fill="black", font_size=14)
    return text


def row(index: int, split: str, folder: Path, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{seed}/{split}/{index}")
    domain = rng.choice(DOMAINS)
    picture, seen = drawn(rng)
    name = f"images/{split}-{index:05d}.png"
    picture.save(folder / name)
    return {
        "images": [name],
        "width": SIDE,
        "height": SIDE,
        "prompt": PROMPT.format(domain=domain.upper()),
        "summary": IRRELEVANT if seen is None else json.dumps(seen, ensure_ascii=False),
        "metadata": {"_fusion_template": f"{domain}_summary", "_fusion_mode": "summary"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=512, help="rows")
    parser.add_argument("--heldout", type=int, default=64, help="rows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    (args.folder / "images").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", args.train), ("heldout", args.heldout)):
        rows = [row(i, split, args.folder, args.seed) for i in range(count)]
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in rows]
        (args.folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    schema = {domain.upper(): SCHEMA for domain in DOMAINS}
    (args.folder / "schema.json").write_text(json.dumps(schema, ensure_ascii=False, indent=1), encoding="utf-8")
    print(f"{args.train} + {args.heldout} rows in {args.folder}")


if __name__ == "__main__":
    main()
