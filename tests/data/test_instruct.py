"""Data written by models: small rule-based ones, one that fails, one that talks nonsense, one that only echoes."""

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.base.artifact import verify
from modelwright.base.errors import CapacityError, ConfigError, DataError
from modelwright.base.types import Completion, Document, Message, SamplingParams, Usage
from modelwright.data.augment import augment, back_translator, change_case, misspell, paraphraser
from modelwright.data.conversation import Conversation
from modelwright.data.convert import convert_file
from modelwright.data.generate import Asker, BudgetSpent, GenerateConfig, save_generated
from modelwright.data.instruct import ask_about, evolve, prefer, run_method, self_instruct, talk_about, task_of
from modelwright.data.novelty import Novelty, common_len, rouge_l
from modelwright.data.score import answer_fault, better_of, parse_score, task_fault

VERBS = "name list explain compare count describe sort define rank summarize translate invent".split()
NOUNS = "rivers colours verbs planets trees kings tools metals birds coins games songs breads knots".split()
KINDS = "old red tall rare loud cheap warm famous broken tiny round heavy".split()
WAYS = "briefly twice slowly in rhyme for children with numbers by age as a letter today in French backwards".split()


def say(rng: random.Random) -> str:
    """Words at random; now and then what has been said before."""
    if rng.random() < 0.2:
        return "name old rivers and trees"
    parts = (VERBS, KINDS, NOUNS, KINDS, NOUNS, WAYS)
    return " ".join(rng.choice(part) for part in parts)


def completion(text: str, prompt: int = 10, reason: str = "stop") -> Completion:
    return Completion(text, (), reason, Usage(prompt, len(text.split())))


class RuleModel:
    """Writes tasks from a list of verbs and things, and answers by rule. No language model at all."""

    def __init__(self) -> None:
        self.num_requests = 0

    def chat(self, messages, params: SamplingParams) -> Completion:
        self.num_requests += 1
        asked, rng = messages[-1].content, random.Random(params.seed)
        if "Write" in asked and "new tasks" in asked:
            tasks = [say(rng) for _ in range(4)]
            return completion("Here:\n" + "\n".join(f"{i}. {t.capitalize()}." for i, t in enumerate(tasks, 1)))
        if "Rewrite the task" in asked or "brand new task" in asked:
            task = asked.split("<<<\n")[1].split("\n>>>")[0].rstrip(".")
            return completion(f"{task}, and tell me why {rng.choice(NOUNS)} matter to {rng.choice(NOUNS)} of today.")
        if "Score: N" in asked:
            return completion(f"Score: {rng.choice('345')}")
        if "Better: A" in asked:
            first, second = re.findall(r"Answer [AB]:\n<<<\n(.*?)\n>>>", asked, re.DOTALL)
            return completion("Better: A" if len(first) > len(second) else "Better: B")
        if "other words" in asked:
            return completion("Please " + asked.split("<<<\n")[1].split("\n>>>")[0])
        if "You play a person" in asked:
            return completion(f"{say(rng)}?".capitalize())
        return completion(f"It is {rng.choice(NOUNS)} number {rng.randrange(1000)}, I would say.")

    def stream(self, messages, params):
        raise NotImplementedError


class Echo(RuleModel):
    """Says back what it was asked."""

    def chat(self, messages, params) -> Completion:
        self.num_requests += 1
        return completion(messages[-1].content)


class Fixed(RuleModel):
    """Always says the same."""

    def __init__(self, text: str, reason: str = "stop"):
        super().__init__()
        self.text, self.reason = text, reason

    def chat(self, messages, params) -> Completion:
        self.num_requests += 1
        return completion(self.text, reason=self.reason)


class Failing(RuleModel):
    """Fails on some requests, then dies."""

    def __init__(self, dies_after: int):
        super().__init__()
        self.dies_after = dies_after

    def chat(self, messages, params) -> Completion:
        if self.num_requests >= self.dies_after or self.num_requests % 3 == 2:
            self.num_requests += 1
            raise CapacityError("full")
        return super().chat(messages, params)


class Garbage(RuleModel):
    """Letters at random, broken characters, control tokens, nothing."""

    def chat(self, messages, params) -> Completion:
        self.num_requests += 1
        rng = random.Random(params.seed)
        parts = ["\ufffd", "1. ", "Question:", "<|im_end|>", "Score: 9", "\x00", "\n", "x" * 50, "", "Quote: a b"]
        return completion("".join(rng.choice(parts) for _ in range(rng.randrange(6))))


SEEDS = [
    Conversation((Message("user", text), Message("assistant", "fine")))
    for text in ("Name three trees.", "Explain how rain comes about.", "Sort these numbers: 3, 1, 2.")
]
KNOWN = [task_of(seed) for seed in SEEDS]
DOCUMENT = Document(
    "d.md", "The tower was built in 1173. It leans because the ground is soft.\n\nIt has seven bells. " * 3
)


def made_by(model, method, config=None, journal=None, known=KNOWN):
    config = config or GenerateConfig(num=30, max_requests=400)
    asker = Asker(model, config, journal)
    made = run_method(method, asker, config, known)
    asker.close()
    return made


def texts(made) -> list:
    return [candidate.conversation for candidate in made.kept]


def test_a_few_seeds_grow_to_many_tasks_that_are_all_new():
    config = GenerateConfig(num=120, max_requests=2000)
    made = made_by(RuleModel(), self_instruct(SEEDS, config), config)
    tasks = [candidate.task for candidate in made.kept]
    assert made.ended == "enough" and len(tasks) == 120
    assert max(rouge_l(a, b) for i, a in enumerate(tasks) for b in [*tasks[:i], *KNOWN]) < 0.7
    assert made.reasons()["known"] > 5, "the rules of the model repeat themselves"
    assert made.report()["spent"]["requests"] == made.spent.requests


def test_a_killed_run_goes_on_to_the_same_result_and_pays_once(tmp_path):
    config = GenerateConfig(num=25, max_requests=300)
    whole = made_by(RuleModel(), self_instruct(SEEDS, config), config)
    journal = tmp_path / "answers.jsonl"
    dying = Failing(10**9)
    dying.chat = RuleModel.chat.__get__(dying)  # the same model, stopped by its budget
    made_by(dying, self_instruct(SEEDS, config), GenerateConfig(num=25, max_requests=11), journal)
    assert dying.num_requests == 11
    journal.write_text(journal.read_text()[:-20])  # killed while writing
    second = RuleModel()
    again = made_by(second, self_instruct(SEEDS, config), config, journal)
    assert texts(again) == texts(whole)
    assert again.spent.replayed == 10 and second.num_requests == again.spent.requests - 10
    third = RuleModel()
    made_by(third, self_instruct(SEEDS, config), config, journal)
    assert third.num_requests == 0, "all is in the journal now"


@pytest.mark.parametrize(("limit", "value"), [("max_requests", 7), ("max_tokens", 60)])
def test_the_budget_is_kept_and_what_was_made_stays(limit: str, value: int):
    model = RuleModel()
    config = GenerateConfig(num=1000, **{limit: value})
    made = made_by(model, self_instruct(SEEDS, config), config)
    assert made.ended == "budget" and made.kept
    assert model.num_requests <= 7 if limit == "max_requests" else made.spent.tokens < 60 + 40


def test_a_failing_model_is_asked_again_and_then_given_up_with_a_reason(tmp_path):
    config = GenerateConfig(num=500, max_requests=200)
    asker = Asker(Failing(30), config, tmp_path / "j.jsonl")
    with pytest.raises(DataError, match=r"failed 5 times in a row.*CapacityError: full.*run the same command again"):
        run_method(self_instruct(SEEDS, config), asker, config, KNOWN)
    assert asker.spent.failed > 5
    asker.close()
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == 20


@pytest.mark.parametrize("model", [Garbage(), Echo(), Fixed(""), Fixed("As an AI language model, I cannot do that.")])
@pytest.mark.parametrize("kind", ["self-instruct", "evolve", "questions", "talks", "preferences"])
def test_nonsense_is_refused_with_reasons_and_the_run_ends(model, kind: str):
    config = GenerateConfig(num=10, max_requests=120)
    method = {
        "self-instruct": self_instruct(SEEDS, config),
        "evolve": evolve(SEEDS, config),
        "questions": ask_about([DOCUMENT], config),
        "talks": talk_about(["rain"], config),
        "preferences": prefer(SEEDS, config),
    }[kind]
    made = made_by(model, method, config)
    is_nonsense_talk = kind in ("talks", "self-instruct", "evolve", "preferences") and isinstance(model, Garbage | Echo)
    assert not made.kept or is_nonsense_talk and len(made.kept) < 4
    assert made.refused and made.ended in ("budget", "exhausted")


def test_evolution_makes_tasks_longer_round_by_round():
    config = GenerateConfig(num=9, max_requests=300, max_rouge=0.95)
    made = made_by(RuleModel(), evolve(SEEDS, config), config)
    first, last = made.kept[0], made.kept[-1]
    assert first.origin.startswith("evolve, seed 1, round 1") and "round" in last.origin
    assert len(last.task.split()) > len(first.task.split())


def test_questions_have_a_quote_that_stands_in_the_document():
    said = (
        "Question: When was the tower built?\nAnswer: In 1173.\nQuote: built  in 1173\n\n"
        "Question: Why does the tower lean?\nAnswer: Soft ground.\nQuote: the ground is made of jelly\n"
    )
    config = GenerateConfig(num=5, max_requests=20)
    made = made_by(Fixed(said), ask_about([DOCUMENT], config), config)
    assert [candidate.task for candidate in made.kept] == ["When was the tower built?"]
    document, _, span = made.kept[0].origin.rpartition(":")
    start, end = map(int, span.split("-"))
    assert document == "d.md" and DOCUMENT.text[start:end] == "built in 1173"
    assert "no quote" in made.reasons()


def test_talks_alternate_and_have_all_their_turns():
    config = GenerateConfig(num=4, max_requests=200, num_turns=3)
    made = made_by(RuleModel(), talk_about(["rain", "snow"], config), config)
    assert len(made.kept) == 4
    for talk in texts(made):
        assert [turn.role for turn in talk.messages] == ["user", "assistant"] * 3


def test_preferences_choose_what_the_judge_does_and_refuse_what_it_cannot(tmp_path):
    config = GenerateConfig(num=3, max_requests=100)
    made = made_by(RuleModel(), prefer(SEEDS, config), config, known=())
    for pair in texts(made):
        assert len(pair.chosen[0].content) >= len(pair.rejected[0].content)
    save_generated(made, tmp_path / "out", config, made_by="a rule-based test model")
    assert verify(tmp_path / "out").settings["made_by"] == "a rule-based test model"
    assert convert_file(tmp_path / "out" / "train.jsonl", tmp_path / "o.jsonl", "preference-text").num_written == len(
        made.kept
    )
    assert 2 <= len(made.kept) <= 3

    class First(RuleModel):
        def chat(self, messages, params):
            is_judging = "Better: A" in messages[-1].content
            return completion("Better: A") if is_judging else super().chat(messages, params)

    biased = made_by(First(), prefer(SEEDS, config), config, known=())
    assert not biased.kept and biased.reasons() == {"undecided": 3}


def test_a_verdict_decides_when_one_is_asked_for():
    config = GenerateConfig(num=20, max_requests=400, min_score=4.0)
    made = made_by(RuleModel(), self_instruct(SEEDS, config), config)
    assert len(made.kept) == 20 and set(made.scores) == {4.0, 5.0} and made.reasons()["score"] > 0


@given(st.text("ab c", max_size=12), st.text("ab c", max_size=12))
@settings(max_examples=200, deadline=None)
def test_common_length_by_bits_equals_the_table(one: str, other: str):
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    assert common_len(one, other) == table[-1][-1]


@given(st.lists(st.text("ab c", min_size=1, max_size=30), max_size=8), st.text("ab c", min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_leaving_hopeless_pairs_out_changes_no_verdict(known: list, text: str):
    is_known = bool(Novelty(known, max_similarity=1.0).objection(text))
    assert is_known == any(rouge_l(text, other) >= 0.7 for other in known) or any(
        set(text.split()) == set(other.split()) for other in known
    )


def test_near_copies_of_whole_examples_are_found():
    answer = " ".join(NOUNS * 4)
    known = Novelty()
    known.add("Say all the words you know.", answer)
    assert "same words" in known.objection("Recite please what there is.", answer + " end")
    assert not known.objection("Recite please what there is.", "another answer altogether, of other words")


@pytest.mark.parametrize(
    ("task", "fault"),
    [
        ("Hi there", "length"),
        ("word " * 200, "length"),
        ("Draw me a nice house", "not text"),
        ("Add a step to the given prompt", "about the prompt"),
        ("- do it now please", "form"),
        ("As an AI language model I cannot", "refusal"),
        ("Name three rivers of Spain.", ""),
    ],
)
def test_tasks_are_judged_by_rules(task: str, fault: str):
    assert task_fault(task).split(":")[0] == fault


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (" ", "empty"),
        ("I'm sorry, but no.", "refusal"),
        ("name THREE rivers", "copy"),
        ("...!", "form"),
        ("a \ufffd", "form"),
        ("one two three four five " * 8, "repetition"),
        ("Ebro, Tajo and Duero.", ""),
    ],
)
def test_answers_are_judged_by_rules(answer: str, fault: str):
    assert answer_fault(answer, "Name three rivers").split(":")[0] == fault


def test_verdicts_are_read_and_nothing_else_is():
    assert [parse_score(text) for text in ("Score: 3", "score is **4**", "Score: 7", None, "Score: 3.5/5", "10")] == [
        3.0, 4.0, None, None, 3.5, None,
    ]  # fmt: skip
    asker = Asker(Fixed("Better: none"), GenerateConfig())
    assert better_of(asker, "t", "a", "b") == -1


def test_the_journal_and_settings_are_checked(tmp_path):
    (tmp_path / "j.jsonl").write_text('{"key": \n{"key": "a"}\n')
    with pytest.raises(DataError, match="line 1: not valid JSON"):
        Asker(RuleModel(), GenerateConfig(), tmp_path / "j.jsonl")
    for wrong in ({"num": 0}, {"max_rouge": 0.0}, {"min_score": 9.0}):
        with pytest.raises(ConfigError):
            GenerateConfig(**wrong)
    with pytest.raises(DataError, match="at least 1 is needed"):
        self_instruct([], GenerateConfig())
    with pytest.raises(DataError, match="no document"):
        ask_about([], GenerateConfig())
    with pytest.raises(DataError, match="no topic"):
        talk_about([], GenerateConfig())
    asker = Asker(RuleModel(), GenerateConfig(max_requests=1))
    asker.ask("a")
    with pytest.raises(BudgetSpent):
        asker.ask("a")
    assert Asker(Fixed("half", "length"), GenerateConfig()).ask("a") is None, "an answer that was cut off is none"


# -- augmentation --------------------------------------------------------------------------------------------------


@given(st.integers(0, 500))
@settings(max_examples=100, deadline=None)
def test_misspelling_changes_words_and_spares_code_numbers_and_links(seed: int):
    text = (
        "Please explain what `json.dumps(value)` returns for 12345, see https://example.com/page_one and os.path.join."
    )
    changed = misspell(text, random.Random(seed), rate=0.3)
    assert changed is not None and changed != text
    for kept in ("`json.dumps(value)`", "12345", "https://example.com/page_one", "os.path.join"):
        assert kept in changed


def test_case_is_left_where_it_means_something():
    rng = random.Random(0)
    assert change_case("Name three trees.", rng) in ("name three trees.", "NAME THREE TREES.", "name three trees")
    assert change_case("What does getValue do?", rng) is None and change_case("Use `x`", rng) is None
    assert misspell("1 + 2", rng) is None


def test_copies_change_the_question_alone():
    asker = Asker(RuleModel(), GenerateConfig())
    swap = back_translator(lambda text: text[::-1], lambda text: "Kindly " + text[::-1].lower())
    for changes in ([misspell], [change_case], [paraphraser(asker)], [swap]):
        made = augment(SEEDS, changes, num_each=1, seed=1)
        assert len(made) == 6 and [c.messages[1] for c in made] == [seed.messages[1] for seed in SEEDS for _ in "ab"]
        assert made[::2] == SEEDS and all(
            a.messages[0] != b.messages[0] for a, b in zip(made[::2], made[1::2], strict=True)
        )
        assert made == augment(SEEDS, changes, 1, 1) or changes[0] not in (misspell, change_case)
    assert augment(SEEDS, [paraphraser(Asker(Echo(), GenerateConfig()))]) != []
    with pytest.raises(ConfigError, match="0 changes"):
        augment(SEEDS, [])


def test_rows_say_who_wrote_them(tmp_path):
    config = GenerateConfig(num=5)
    made = made_by(RuleModel(), self_instruct(SEEDS, config), config)
    save_generated(made, tmp_path / "out", config, made_by="rules")
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and {row["made_by"] for row in rows} == {"rules"}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["kept"] == 5


@pytest.mark.parametrize("text", ["Question: a" * 9000, "Question: a\n" * 9000, "1. " * 30_000, "Score: " * 15_000])
def test_long_nonsense_is_read_quickly(text: str):
    config = GenerateConfig(num=1, max_requests=2)
    for method in (ask_about([DOCUMENT], config), self_instruct(SEEDS, config)):
        assert made_by(Fixed(text), method, config).refused
    assert parse_score(text) is None
