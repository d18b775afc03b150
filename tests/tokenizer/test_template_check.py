"""Each check finds its own fault, and a sound template passes them all."""

import pytest

from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.tokenizer.template_check import check_template, mask_pieces

OPEN, END = "<|im_start|>", "<|im_end|>"
TURN = "{{ '" + OPEN + "' + m.role + '\\n' + m.content + '" + END + "\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '" + OPEN + "assistant\\n' }}{% endif %}"


def found(tokenizer: Tokenizer, source: str) -> dict[str, tuple[str, str]]:
    return {check.name: (check.state, check.detail) for check in check_template(tokenizer.with_chat_template(source))}


def test_a_sound_template_passes(house: Tokenizer):
    states = {check.name: check.state for check in check_template(house)}
    assert set(states.values()) == {"ok", "none"} and states["one beginning"] == "none"


@pytest.mark.parametrize("kind", ["llama2", "llama3"])
def test_published_templates_pass_and_say_what_they_refuse(kind: str, published: dict):
    checks = check_template(load_tokenizer(published[kind]))
    assert {check.state for check in checks} == {"ok"}
    assert ("no system turn" in checks[0].detail) == (kind == "llama2")


@pytest.mark.parametrize(
    ("source", "name", "detail"),
    [
        ("{{ raise_exception('never') }}", "renders", "never"),
        ("{{ messages[0].missing.field }}", "renders", "missing"),
        ("{% for m in messages if m.role != 'user' %}" + TURN + "{% endfor %}" + PROMPT, "keeps every text", "user"),
        (
            "{{ messages | length }}{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT,
            "only appends",
            "written differently",
        ),
        (
            "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}{{ 'Go: ' }}{% endif %}",
            "only appends",
            "the prompt for turn 3",
        ),
        (
            "{% for m in messages %}{% generation %}" + TURN + "{% endgeneration %}{% endfor %}" + PROMPT,
            "trains the answers",
            "role system is trained",
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{% generation %}x{% endgeneration %}{% endif %}"
            + TURN
            + "{% endfor %}"
            + PROMPT,
            "trains the answers",
            "not all of this answer",
        ),
        (
            "{% for m in messages %}{{ '" + OPEN + "' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
            "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '" + END + "\\n' }}{% endfor %}",
            "trains the stop",
            "does not stop a model",
        ),
        (
            "{% for m in messages %}" + TURN.replace("m.content", "m.content[:1] + '" + END + "' + m.content[1:]")
            + "{% endfor %}" + PROMPT,
            "keeps every text",
            "is not in the rendering",
        ),
    ],
)  # fmt: skip
def test_each_fault_is_found(house: Tokenizer, source: str, name: str, detail: str):
    state, said = found(house, source)[name]
    assert state == "wrong" and detail in said, said


@pytest.mark.parametrize(("count", "state"), [(0, "wrong"), (1, "ok"), (2, "wrong")])
def test_one_beginning_is_counted(count: int, state: str, published: dict):
    tokenizer = load_tokenizer(published["llama3"])
    assert tokenizer.chat_template is not None
    source = "{{ bos_token }}" * count + tokenizer.chat_template.replace("{{- bos_token }}", "")
    assert found(tokenizer, source)["one beginning"][0] == state


def test_pieces_join_to_the_rendering(house: Tokenizer):
    talk = [{"role": "user", "content": "Wé 👩‍👩‍👧"}, {"role": "assistant", "content": "日本 👩"}]
    pieces = mask_pieces(house, talk)
    assert "".join(piece.text for piece in pieces) == house.render_chat(talk)
    assert "".join(piece.text for piece in pieces if piece.is_trained) == "日本 👩<|im_end|>"
    assert [piece.text for piece in pieces if piece.is_special and piece.is_trained] == ["<|im_end|>"]
