"""Makes a small data set of thermal storage decisions: `thermal_harmony.csv` to train on, `heldout.csv` beside it.

Each row is an hour: the grid's CO2 intensity now and in the hours to come, how full the store is, what heat is wanted.
The four actions charge at 0, 1, 2 or 3 thirds of the heat pump's power. q is the negative CO2 of meeting the demand of
the next hours when the store then runs as cheaply as it can; the reward is softmax(q / 0.05) over the actions.

    python recipes/gpt_oss/thermal_data.py --out data/thermal [--rows 30] [--seed 0]
"""

import argparse
import csv
import math
import random
from pathlib import Path

ACTIONS, HOURS, TAU = 4, 6, 0.05
CAPACITY, STEP = 6, 1
COLUMNS = [
    "timestep",
    "prompt",
    *(f"q_action_{k}" for k in range(ACTIONS)),
    *(f"reward_action_{k}" for k in range(ACTIONS)),
]
SYSTEM = "You are ChatGPT.\n\nReasoning: low\n\n# Valid channels: analysis, commentary, final."
DEVELOPER = (
    "You run a thermal storage plant. Charge it with 0, 1, 2 or 3 units this hour so that the heat wanted in the hours "
    "to come costs the least CO2. Heat that the store cannot give is made when it is wanted. End with one of "
    "[0] [1] [2] [3]."
)


def row(timestep: int, rng: random.Random) -> dict[str, object]:
    intensity = [round(rng.uniform(0.1, 0.6), 2) for _ in range(HOURS)]
    demand, store = [rng.randint(0, 3) for _ in range(HOURS)], rng.randint(0, CAPACITY)
    values = [-_emitted(intensity, demand, store, action) / HOURS for action in range(ACTIONS)]
    best = max(values)
    shares = [math.exp((value - best) / TAU) for value in values]
    asked = f"CO2 kg/unit: {intensity}\nHeat wanted: {demand}\nStore: {store} of {CAPACITY}"
    prompt = (
        f"<|start|>system<|message|>{SYSTEM}<|end|><|start|>developer<|message|># Instructions\n\n{DEVELOPER}<|end|>"
        f"<|start|>user<|message|>{asked}<|end|><|start|>assistant"
    )
    found: dict[str, object] = {"timestep": timestep, "prompt": prompt}
    found |= {f"q_action_{k}": round(value, 5) for k, value in enumerate(values)}
    return found | {f"reward_action_{k}": round(share / sum(shares), 5) for k, share in enumerate(shares)}


def _emitted(intensity: list[float], demand: list[int], store: int, action: int) -> float:
    """The least CO2 from now on, `action` taken now."""
    least = {store: 0.0}
    for hour, (carbon, heat) in enumerate(zip(intensity, demand, strict=True)):
        after: dict[int, float] = {}
        for level, emitted in least.items():
            for charge in [action] if hour == 0 else range(ACTIONS):
                left = min(level + charge, CAPACITY) - heat
                total = emitted + carbon * (charge + max(-left, 0))
                key = max(left, 0)
                after[key] = min(after.get(key, math.inf), total)
        least = after
    return min(least.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a small thermal storage data set.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, seed in (("thermal_harmony.csv", args.seed), ("heldout.csv", args.seed + 1)):
        rng = random.Random(seed)
        with (args.out / name).open("w", newline="", encoding="utf-8") as file:
            rows = csv.DictWriter(file, COLUMNS)
            rows.writeheader()
            rows.writerows(row(timestep, rng) for timestep in range(args.rows))
        print(args.out / name)


if __name__ == "__main__":
    main()
