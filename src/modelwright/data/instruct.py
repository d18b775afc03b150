"""Tasks, conversations, questions and preferences written by any `ChatModel`, each checked before it is kept.

- *self-instruct*: new tasks from a few known ones, then their answers.
- *evolve*: each seed made harder, or rarer, a few times over.
- *questions*: question, answer and quote from passages of documents; the quote must stand in the passage.
- *talks*: conversations of several turns, the model playing the user and the assistant in turn.
- *preferences*: two answers to each seed's task, told apart by a judge that is asked in both orders.

Each method is a generator of candidates and refusals; `run_method` keeps what is new and good until there are enough or
the budget is spent. Prompts stand in `data.prompts`, rules in `data.score`, what counts as new in `data.novelty`.

Source: Wang et al. 2023, arXiv:2212.10560; Xu et al. 2023, arXiv:2304.12244; Zheng et al. 2023, arXiv:2306.05685. Not
done: Self-Instruct's separate way for classification tasks, Evol-Instruct's random choice of deepening by task.
"""

import random
import re
from collections.abc import Iterator, Sequence

from modelwright.base.errors import DataError
from modelwright.base.types import Document, Message
from modelwright.data import prompts
from modelwright.data.conversation import Conversation
from modelwright.data.generate import Asker, BudgetSpent, Candidate, GenerateConfig, Generated, Method, Refused
from modelwright.data.novelty import Novelty
from modelwright.data.score import answer_fault, better_of, rate, task_fault

_NUMBERED = re.compile(r"^\s*(?:task\s*)?\d{1,3}\s*[.):]\s*", re.IGNORECASE | re.MULTILINE)
_PART = re.compile(r"\s*[*#]*(question|answer|quote)[*]*\s*:[*]*\s*(.*)", re.IGNORECASE)
_MAX_EMPTY = 20  # requests in a row that gave nothing new: the model has no more to say
_PASSAGE_CHARS = 1500
_NUM_SEED_EXAMPLES, _NUM_MADE_EXAMPLES, _NUM_ASKED = 6, 2, 4


def task_of(conversation: Conversation) -> str:
    """Return what is asked first in a conversation."""
    return next((message.content for message in conversation.messages if message.role == "user"), "")


def run_method(method: Method, asker: Asker, config: GenerateConfig, known: Sequence[str] = ()) -> Generated:
    """Keep what a method proposes, while it is new and good, until there is enough or the budget is spent.

    Args:
        method: One of those below, given its seeds.
        asker: The model behind its budget.
        config: How many, and what counts as new and good.
        known: Tasks that are known already: those of the seeds.
    """
    made = Generated(spent=asker.spent)
    novelty = Novelty(known, config.max_rouge, config.max_similarity)
    num_empty = 0
    try:
        for found in method(asker):
            reason, score = _objection(found, novelty, asker, config)
            num_empty = num_empty + 1 if reason else 0
            if reason:
                text = found.text if isinstance(found, Refused) else _text_of(found)
                made.refused.append(Refused(reason, text))
            elif isinstance(found, Candidate):
                novelty.add(found.task, _text_of(found))
                made.kept.append(found)
                made.scores.append(score)
            if len(made.kept) == config.num:
                made.ended = "enough"
                break
            if num_empty >= _MAX_EMPTY * _NUM_ASKED:
                made.ended = "exhausted"
                break
        else:
            made.ended = "exhausted"
    except BudgetSpent:
        made.ended = "budget"
    return made


def _text_of(candidate: Candidate) -> str:
    conversation = candidate.conversation
    return "\n".join(turn.content for turn in (*conversation.messages, *conversation.chosen))


def _objection(
    found: Candidate | Refused, novelty: Novelty, asker: Asker, config: GenerateConfig
) -> tuple[str, float | None]:
    """Return why a candidate is not kept, or nothing and the model's verdict."""
    if isinstance(found, Refused):
        return found.reason, None
    talk = (*found.conversation.messages, *found.conversation.chosen)
    fault = task_fault(found.task, config.only_text and not found.is_grounded)
    asked = found.task
    for turn in talk:
        asked = turn.content if turn.role == "user" else asked
        if turn.role == "assistant":
            fault = fault or answer_fault(turn.content, asked)
    if not fault and (like := novelty.objection(found.task, _text_of(found))):
        fault = f"known: {like}"
    if fault or config.min_score is None:
        return fault, None
    score = rate(asker, found.task, talk[-1].content)
    if score is None:
        return "no score: the judge gave no number from 1 to 5", None
    return (f"score: {score:g} is below {config.min_score:g}" if score < config.min_score else ""), score


def self_instruct(seeds: Sequence[Conversation], config: GenerateConfig) -> Method:
    """Return the method that makes new tasks from a few known ones, and their answers."""
    pool = _tasks(seeds, 1)

    def method(asker: Asker) -> Iterator[Candidate | Refused]:
        made: list[str] = []
        novelty = Novelty(pool, config.max_rouge, config.max_similarity)
        while True:
            rng = random.Random(f"{config.seed}:tasks:{asker.spent.requests}")
            shown = rng.sample(pool, min(_NUM_SEED_EXAMPLES, len(pool)))
            shown += rng.sample(made, min(_NUM_MADE_EXAMPLES, len(made)))
            examples = "\n".join(f"{number}. {_one_line(task)}" for number, task in enumerate(shown, start=1))
            said = asker.ask(prompts.NEW_TASKS.format(examples=examples, num=_NUM_ASKED))
            tasks = _numbered(said)
            if not tasks:
                yield Refused("no task: the answer holds no numbered tasks", said or "")
            for task in tasks:
                # Looked at before an answer is paid for; the whole example is looked at again afterwards.
                like = novelty.objection(task)
                fault = task_fault(task, config.only_text) or (f"known: {like}" if like else "")
                if fault:
                    yield Refused(fault, task)
                    continue
                novelty.add(task)
                answer = asker.ask(prompts.ANSWER_TASK.format(instruction=task))
                if answer is None:
                    yield Refused("empty: no answer, or one that was cut off", task)
                    continue
                made.append(task)
                yield _single(task, answer, "self-instruct")

    return method


def evolve(seeds: Sequence[Conversation], config: GenerateConfig, num_rounds: int = 4) -> Method:
    """Return the method that makes each task harder, or rarer, over some rounds; one that fails stays as it was."""
    pool = _tasks(seeds, 1)

    def method(asker: Asker) -> Iterator[Candidate | Refused]:
        current = list(pool)
        for round_number in range(num_rounds):
            for number, task in enumerate(current):
                rng = random.Random(f"{config.seed}:evolve:{round_number}:{number}")
                way = rng.choice(list(prompts.WAYS))
                asked = prompts.EVOLVE_BROAD if way == "broad" else prompts.EVOLVE
                said = asker.ask(asked.format(instruction=task, how=prompts.WAYS[way]))
                fault = task_fault(said, config.only_text) if said else "empty: no new task, or one that was cut off"
                if fault or said is None:
                    yield Refused(fault, said or task)
                    continue
                answer = asker.ask(prompts.ANSWER_TASK.format(instruction=said))
                if answer is None:
                    yield Refused("empty: no answer, or one that was cut off", said)
                    continue
                fault = answer_fault(answer, said)
                if not fault:
                    current[number] = said
                yield _single(said, answer, f"evolve, seed {number + 1}, round {round_number + 1}, {way}")

    return method


def ask_about(documents: Sequence[Document], config: GenerateConfig, num_each: int = 3) -> Method:
    """Return the method that makes question and answer from documents; each answer has a quote that stands there."""
    if not documents:
        raise DataError("There is no document to ask about. Give documents with text.")

    def method(asker: Asker) -> Iterator[Candidate | Refused]:
        for document in documents:
            for start, passage in _passages(document.text):
                said = asker.ask(prompts.ASK_ABOUT.format(num=num_each, passage=passage))
                found = _triples(said or "")
                if not found:
                    yield Refused("no question: the answer is not of the form asked for", said or "")
                for triple in found:
                    quote = _find_quote(passage, triple["quote"])
                    if quote is None:
                        yield Refused("no quote: what it quotes is not in the passage", "\n".join(triple.values()))
                        continue
                    origin = f"{document.id}:{start + quote[0]}-{start + quote[1]}"
                    yield _single(triple["question"], triple["answer"], origin, is_grounded=True)

    return method


def talk_about(topics: Sequence[str], config: GenerateConfig) -> Method:
    """Return the method that makes conversations of ``config.num_turns`` turns about each topic, over and over."""
    if not topics:
        raise DataError("There is no topic to talk about. Give at least one.")

    def method(asker: Asker) -> Iterator[Candidate | Refused]:
        while True:
            for topic in topics:
                turns: list[Message] = []
                for _ in range(config.num_turns):
                    so_far = "\n".join(f"{turn.role}: {turn.content}" for turn in turns) or "(nothing yet)"
                    said = asker.ask(prompts.PLAY_USER.format(topic=topic, talk=so_far))
                    answer = asker.ask([*turns, Message("user", said)]) if said else None
                    if said is None or answer is None:
                        break
                    turns += [Message("user", said), Message("assistant", answer)]
                if len(turns) < 2 * config.num_turns:
                    yield Refused("empty: the talk broke off", "\n".join(turn.content for turn in turns))
                    continue
                task = turns[0].content
                yield Candidate(Conversation(tuple(turns)), task, f"talk about {topic}")

    return method


def prefer(seeds: Sequence[Conversation], config: GenerateConfig, judge: Asker | None = None) -> Method:
    """Return the method that answers each task twice and has a judge, the same model if none is given, choose.

    The judge sees both orders; a pair over which it contradicts itself is refused.
    """
    pool = _tasks(seeds, 1)

    def method(asker: Asker) -> Iterator[Candidate | Refused]:
        for number, task in enumerate(pool, start=1):
            answers = [asker.ask([Message("user", task)], temperature=t) for t in (config.temperature, 1.2)]
            one, other = answers
            if one is None or other is None or one == other:
                yield Refused("same: no two different answers", task)
                continue
            best = better_of(judge or asker, task, one, other)
            if best < 0:
                yield Refused("undecided: the judge contradicts itself or does not choose", task)
                continue
            chosen, rejected = (one, other) if best == 0 else (other, one)
            pair = Conversation(
                (Message("user", task),),
                chosen=(Message("assistant", chosen),),
                rejected=(Message("assistant", rejected),),
            )
            yield Candidate(pair, task, f"seed {number}")

    return method


def _tasks(seeds: Sequence[Conversation], least: int) -> list[str]:
    tasks = list(dict.fromkeys(task for task in map(task_of, seeds) if task.strip()))
    if len(tasks) < least:
        raise DataError(f"The seeds hold {len(tasks)} tasks; at least {least} is needed. Give examples to begin with.")
    return tasks


def _single(task: str, answer: str, origin: str, is_grounded: bool = False) -> Candidate:
    return Candidate(Conversation((Message("user", task), Message("assistant", answer))), task, origin, is_grounded)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _numbered(text: str | None) -> list[str]:
    r"""Return the entries of a numbered list; what stands before the first number is left out.

    >>> _numbered("Sure:\n1. Name a tree.\n2) Add 2\nand 3.")
    ['Name a tree.', 'Add 2 and 3.']
    """
    return [entry for entry in map(_one_line, _NUMBERED.split(text or "")[1:]) if entry]


def _triples(text: str) -> list[dict[str, str]]:
    r"""Return the questions of an answer that have an answer and a quote; read line by line, so that no text is slow.

    >>> _triples("Question: Who?\nAnswer: He\ndid.\nQuote: he did\nQuestion: Why?")
    [{'question': 'Who?', 'answer': 'He\ndid.', 'quote': 'he did'}]
    """
    found: list[dict[str, str]] = []
    name = ""
    for line in text.split("\n"):
        part = _PART.match(line)
        if part:
            name = part[1].lower()
            if name == "question" or not found:
                found.append({})
            found[-1][name] = part[2].strip()
        elif name and line.strip():
            found[-1][name] += "\n" + line.strip()
    return [triple for triple in found if len(triple) == 3 and all(triple.values())]


def _passages(text: str) -> Iterator[tuple[int, str]]:
    """Yield (start, passage) of whole paragraphs, up to some 1,500 characters; a longer paragraph is cut."""
    at = 0
    while at < len(text):
        end = min(len(text), at + _PASSAGE_CHARS)
        if end < len(text):
            cut = text.rfind("\n\n", at, end)
            end = cut + 2 if cut > at else end
        if text[at:end].strip():
            yield at, text[at:end]
        at = end


def _find_quote(passage: str, quote: str) -> tuple[int, int] | None:
    """Return where a quote stands in a passage, blanks apart; quotes of fewer than two words prove nothing."""
    words = quote.strip().strip("\"'\u201c\u201d.").split()
    if len(words) < 2:
        return None
    found = re.search(r"\s+".join(map(re.escape, words)), passage)
    return found.span() if found else None
