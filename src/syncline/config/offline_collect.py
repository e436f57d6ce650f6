"""The pipeline file's sections about rollouts and preferences: `collect`, `pairs`, and where questions come from."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from syncline.config.schema import Fraction, Section

PROMPT = "{question}\n\nThink step by step, then end with a line `Answer: <number>`.\n\n"
"""One for the whole pipeline: what is sampled, preferred and evaluated are answers to the same."""


class Questions(Section):
    """Rows of `question` and `answer` from one of three places."""

    name: str = "questions"
    path: str | None = None
    """A JSON lines file."""
    hub: str | None = None
    """`name`, or `name:config`, on the Hugging Face hub."""
    split: str = "test"
    """Of the hub's data set."""
    made: dict[str, Any] | None = None
    """Sums of the task `arithmetic`, held-out ones where they are evaluated on: its arguments, such as
    `{levels: [{digits: 2, terms: 2}]}`."""
    num_questions: PositiveInt | None = None
    """The first so many; absent: all there are, 256 where they are made."""


class Collect(Section):
    """Rollouts of one frozen policy, as many as questions × arms × samples."""

    questions: Questions
    coherence: Literal["v8", "v11", "v2"] = "v2"
    """Arms and scores: those of the original's two versions, to the digit, or ours, which tell siblings apart."""
    prompt: str = PROMPT
    """Of `v2`: a message of the user's; `{question}` is filled in. The other versions have their own."""
    num_samples: PositiveInt | None = None
    """Attempts at a question by an arm in a round; absent: 1, in `v2` 6 and, in other words, 2."""
    rephrase: bool = True
    """Of `v2`: also asks for each question in other words. Off for models that read nothing but the question."""
    temperature: PositiveFloat | None = None
    """Absent: the arm's."""
    max_rounds: PositiveInt = 1
    """Adaptive sampling: a question whose attempts so far are all right, or all give one answer, is done; any other is
    asked again, up to so many rounds."""
    num_twins: NonNegativeInt = 0
    """Of `v2`: so many samples of each arm also answer the question with one number changed, where its solution tells
    what the answer then is."""
    max_tokens: PositiveInt = 512
    adapter: str | None = None
    """A PEFT folder that engines sample from over the model as it is; nothing needs to be merged."""
    requests_per_engine: PositiveInt | None = None
    """In flight at once. Absent: twice `engine.max_num_seqs`, so that an engine never waits for us, and a completion no
    longer than another takes; where there is less to do, each engine's part of it."""
    lost_after_seconds: PositiveFloat = 60.0
    """An engine that does not answer for so long is given up; others do its work meanwhile."""


class Pairs(Section):
    """Preferences from rollouts: right over wrong, and more coherent over less among the right."""

    strategy: Literal["nearest_length", "best_vs_worst", "hard_negative", "all"] = "nearest_length"
    """Which right and wrong answers meet. `nearest_length`: the most alike in length; `best_vs_worst`: by reward, from
    the ends; `hard_negative`: the right against the commonest wrong answer; `all`: every one against every other."""
    max_per_question: PositiveInt = 4
    """Of right over wrong."""
    max_coherence_per_question: NonNegativeInt = 1
    """Of right over right, by reward."""
    min_reward_gap: PositiveFloat = 0.05
    """Between two right ones that make a pair."""
    max_similarity: Fraction = 0.9
    """Jaccard similarity of word pairs above which an answer is a near-duplicate of one already taken, and chosen and
    rejected are no pair; 1 keeps all but equal texts."""
    across_prompts: bool = False
    """Also pairs answers to different prompts; the pair's prompt is the chosen one's, so the rejected text is then off
    it, and is counted."""
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of the questions, by a hash of their text: their pairs go to a file of their own."""
