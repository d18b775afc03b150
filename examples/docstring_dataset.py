"""Grow a data set of functions and docstrings from two seeds, filtered: python examples/docstring_dataset.py OUT [NUM]

The writer here is no language model: it puts names together from lists and repeats itself now and then, so that the
example runs anywhere in a second and what the filters do can be seen. Give `Asker` an `LLM` or any other ChatModel.
"""

import ast
import random
import sys
from pathlib import Path

from modelwright.base.types import Completion, Message, SamplingParams, Usage
from modelwright.data.conversation import Conversation
from modelwright.data.generate import Asker, Candidate, GenerateConfig, Refused, save_generated
from modelwright.data.instruct import run_method, self_instruct, task_of

VERBS = "count merge split sort filter reverse join scale clamp rotate encode parse trim pad hash zip".split()
NOUNS = "words rows dates prices pixels names tokens paths scores labels bytes pages nodes edges".split()
HOWS = ["shortest first", "into one list", "where they stand", "keeping order", "above some limit", "row by row"]
SEEDS = {"def add(a, b): return a + b": "Return the sum.", "def is_empty(x): return not x": "Tell if x is empty."}


class RuleWriter:
    """A stand-in for a language model: rules and lists, told by its name in the data set."""

    def chat(self, messages: list[Message], params: SamplingParams) -> Completion:
        """Write tasks, or the docstring of the function in a task; every tenth answer is bad on purpose."""
        rng, asked = random.Random(params.seed), messages[-1].content
        if "new tasks" in asked:
            picks = [[rng.choice(words) for words in (VERBS, NOUNS, NOUNS, NOUNS, HOWS)] for _ in range(4)]
            lines = [f"{i}. def {v}_{n}({a}, {b}): ...  # {h}" for i, (v, n, a, b, h) in enumerate(picks, 1)]
            return Completion("\n".join(lines), (), "stop", Usage(len(asked) // 4, 80))
        code = asked.split("<<<\n")[1].split("\n>>>")[0]
        verb, thing = code.partition("def ")[2].partition("(")[0].split("_")
        good = f"{verb.capitalize()} the {thing}, {code.partition('# ')[2]}."
        return Completion(rng.choice([good] * 9 + ["I'm sorry, as an AI I cannot."]), (), "stop", Usage(60, 12))

    def stream(self, messages, params):
        """Not needed here."""
        raise NotImplementedError


def parses(found: Candidate | Refused) -> Candidate | Refused:
    """Refuse tasks that are no Python: a check of this data set's own."""
    try:
        ast.parse(getattr(found, "task", "pass"))
    except SyntaxError as error:
        return Refused(f"no Python: {error.msg}", found.task)
    return found


if __name__ == "__main__":
    config = GenerateConfig(num=int(sys.argv[2]) if sys.argv[2:] else 300, max_requests=5000, only_text=False)
    seeds = [Conversation((Message("user", code), Message("assistant", text))) for code, text in SEEDS.items()]
    asker, propose = Asker(RuleWriter(), config), self_instruct(seeds, config)
    made = run_method(lambda a: map(parses, propose(a)), asker, config, list(map(task_of, seeds)))
    save_generated(made, Path(sys.argv[1]), config, made_by="RuleWriter: rules and lists, no language model")
    print(f"{len(seeds)} seeds -> {len(made.kept)} examples, {len(made.refused)} refused: {made.reasons()}")
    print(made.kept[0].task, "->", made.kept[0].conversation.messages[1].content)
