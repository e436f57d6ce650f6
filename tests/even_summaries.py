"""Summaries whose reward differs between attempts of a model that knows nothing yet, so that every step learns."""

from syncline.envs.scoring import Score
from syncline.envs.tasks.summary import Summary, SummaryTask


class EvenSummaries(Summary):
    name = "even_summaries"

    def score(self, task: SummaryTask, text: str) -> Score:
        known = super().score(task, text)
        return Score(known.reward + sum(ord(c) % 2 == 0 for c in text) / 16, known.parts)
