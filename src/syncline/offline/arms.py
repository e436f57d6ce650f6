"""The arms of a collection: the ways each question is asked.

Arms of one instruction differ in temperature alone, so their answers are answers to one prompt and can be preferred to
each other. `v8` and `v11` are the original's names, temperatures and nucleus sizes, its instructions in words of
our own; `v2` asks all alike at a temperature at which attempts differ, and twice in other words.
"""

from dataclasses import dataclass

from syncline.types import Message

PRECISE = "You reason precisely: short, explicit, linear steps and nothing beside them."
REFLECTIVE = "You reason with care: explain each step, and say which steps could be fragile."
FOR_HASHES = "Finish with '#### <number>'."
FOR_ANSWER = "Finish with 'Answer: <number>'."
TUTOR = "You teach mathematics. Solve the problem step by step and give the result in the form '#### <number>'."
IN_ORDER = "Go step by step, clearly and in order."
RESTATE = "First say the problem in your own words, to be sure of it; then solve it."
DOUBT = (
    "Your first idea may be wrong: look for traps and edge cases, then solve the problem and mark the fragile steps."
)
IN_OTHER_WORDS = "First say the following problem in your own words."
PROBLEM = "{instruction}\n\nProblem:\n{{question}}\n\nSolution:\n"


@dataclass(frozen=True, slots=True)
class Arm:
    name: str
    template: str
    """A message; `{question}` is filled in."""
    temperature: float
    top_p: float
    num_samples: int = 1
    """Attempts at a question in a round."""
    rephrases: bool = False
    """Asks for the question in other words first: what other arms' answers are compared with."""

    def prompt(self, question: str) -> tuple[Message, ...]:
        """One message: models that were never taught to chat read it as it stands."""
        return (Message("user", self.template.replace("{question}", question)),)


def arms_of(coherence: str, *, prompt: str) -> tuple[Arm, ...]:
    """Of a version; `prompt` is the template of `v2`."""
    if coherence == "v8":
        return (
            *_family("wolfram", f"{PRECISE} {FOR_HASHES}\n\n{TUTOR}", 0.95),
            *_family("maudlin", f"{REFLECTIVE} {FOR_HASHES}\n\n{TUTOR}", 0.9),
        )
    if coherence == "v11":
        return (
            *_family("wolfram", f"{PRECISE} {FOR_ANSWER}", 0.95),
            *_family("maudlin", f"{REFLECTIVE} {FOR_ANSWER}", 0.9),
            Arm("wolfram_standard", _problem(f"{PRECISE} {IN_ORDER} {FOR_ANSWER}"), 0.3, 0.95),
            Arm("wolfram_rephrase", _problem(f"{PRECISE} {RESTATE} {FOR_ANSWER}"), 0.3, 0.95, rephrases=True),
            Arm("maudlin_cf1", _problem(f"{REFLECTIVE} {DOUBT} {FOR_ANSWER}"), 0.5, 0.9),
        )
    return (
        Arm("solve", prompt, 0.8, 1.0, num_samples=6),
        Arm("rephrase", f"{IN_OTHER_WORDS}\n\n{prompt}", 0.8, 1.0, num_samples=2, rephrases=True),
    )


def _family(name: str, instruction: str, top_p: float) -> list[Arm]:
    return [Arm(f"{name}_{i}", _problem(instruction), round(0.2 + 0.1 * i, 1), top_p) for i in range(4)]


def _problem(instruction: str) -> str:
    return PROBLEM.format(instruction=instruction)
