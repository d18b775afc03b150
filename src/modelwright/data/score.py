"""Is a written example good enough to learn from? Rules that name their reason, and a model's verdict.

The rules look for what models write when they fail: refusals, talk about the prompt, nothing but the question again,
loops, an answer cut short, tasks about pictures and links that text cannot answer. A verdict is a number from 1 to 5
asked from the model itself or a better one; what it says is not trusted to be a number.

Source: Wang et al. 2023, arXiv:2212.10560, section 2.2 (words that tell a task about pictures); Xu et al. 2023,
arXiv:2304.12244, section 3.2 (evolutions that failed); Chen et al. 2023, arXiv:2307.08701 (a verdict of 1 to 5).
"""

import re
from collections import Counter

from modelwright.data.generate import Asker
from modelwright.data.novelty import words_of
from modelwright.data.prompts import COMPARE, RATE

_NOT_TEXT = re.compile(
    r"\b(?:images?|graphs?|pictures?|photos?|files?|maps?|draw|plot|flowchart|go to|videos?|audio|music|diagrams?)\b",
    re.I,
)
_REFUSAL = re.compile(
    r"\bas an? (?:AI|artificial intelligence|language model)|\bI(?: am|'m) (?:sorry|unable|not able)|"
    r"^(?:sorry|unfortunately)\b|\bI (?:cannot|can't|can not) (?:help|assist|answer|do|provide|fulfil)",
    re.I,
)
_ABOUT_PROMPT = re.compile(
    r"\b(?:given|rewritten|new|created) (?:prompt|task|instruction)s?\b|#(?:given|rewritten)|<<<|>>>|\btask below\b",
    re.I,
)
_SCORE = re.compile(r"score\s*(?:is|:|=)?\s*\**\s*([1-5](?:\.\d+)?)(?:\s*/\s*5)?(?![\d./])", re.I)
_BETTER = re.compile(r"better\s*(?:is|:|=)?\s*\**\s*(?:answer\s+)?(A|B|none)\b", re.I)
MIN_TASK_WORDS, MAX_TASK_WORDS = 3, 150


def task_fault(task: str, only_text: bool = True) -> str:
    """Say why a task is not worth an answer; empty when it is. ``only_text`` refuses tasks about pictures and files.

    >>> task_fault("Draw a picture of a house.")
    "not text: speaks of 'draw'"
    """
    words = task.split()
    if not MIN_TASK_WORDS <= len(words) <= MAX_TASK_WORDS:
        return f"length: a task of {len(words)} words, expected {MIN_TASK_WORDS} to {MAX_TASK_WORDS}"
    if only_text and (found := _NOT_TEXT.search(task)):
        return f"not text: speaks of {found[0].lower()!r}"
    if found := _ABOUT_PROMPT.search(task):
        return f"about the prompt: {found[0]!r}"
    if not task[0].isalnum() and task[0] not in "\"'`(":
        return f"form: begins with {task[0]!r}"
    if _REFUSAL.search(task):
        return "refusal: the task is one"
    return ""


def answer_fault(answer: str, task: str) -> str:
    """Say why an answer is not worth learning; empty when it is.

    >>> answer_fault("As an AI language model, I cannot help.", "Name a tree.")
    'refusal: As an AI'
    """
    if not answer.strip():
        return "empty: the answer says nothing"
    if found := _REFUSAL.search(answer[:200]):
        return f"refusal: {found[0]}"
    if found := _ABOUT_PROMPT.search(answer):
        return f"about the prompt: {found[0]!r}"
    if words_of(answer) == words_of(task):
        return "copy: the answer is the task"
    if not any(char.isalnum() for char in answer):
        return "form: no letter and no digit"
    if "\ufffd" in answer:
        return "form: broken characters"
    words = words_of(answer)
    if len(words) >= 20:
        grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
        share = sum(n for n in grams.values() if n > 1) / max(1, len(words) - 3)
        if share > 0.5:
            return f"repetition: {share:.0%} of the answer's four-word runs come again"
    return ""


def parse_score(text: str | None) -> float | None:
    """Return the number of a verdict; None where there is none.

    >>> parse_score("It is fine. Score: 4/5"), parse_score("Score: 11"), parse_score("good")
    (4.0, None, None)
    """
    found = _SCORE.findall(text or "")
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 5 else None


def rate(asker: Asker, task: str, answer: str) -> float | None:
    """Ask for a verdict from 1 to 5; None where the model gave none."""
    return parse_score(asker.ask(RATE.format(instruction=task, answer=answer), temperature=0.0))


def better_of(asker: Asker, task: str, one: str, other: str) -> int:
    """Ask which of two answers is better, in both orders: 0 or 1, and -1 where the verdicts disagree or are none."""
    verdicts = []
    for first, second in ((one, other), (other, one)):
        said = asker.ask(COMPARE.format(instruction=task, first=first, second=second), temperature=0.0)
        found = _BETTER.findall(said or "")
        verdicts.append(found[-1].upper() if found else "")
    return {("A", "B"): 0, ("B", "A"): 1}.get((verdicts[0], verdicts[1]), -1)
