"""Designed templates: what they render, what they train, and that transformers agrees."""

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.base.config import build
from modelwright.base.errors import ConfigError
from modelwright.base.types import Message, ToolCall
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.tokenizer.template_check import check_template
from modelwright.tokenizer.template_design import (
    DESIGNS,
    DesignFile,
    RoleDesign,
    TemplateDesign,
    chatml_roles,
    save_template,
    write_jinja,
)

TALK = [
    {"role": "system", "content": 'Be it\'s \\n "brief".'},
    {"role": "user", "content": "  What is 2+2? "},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And\n3+3?"},
    {"role": "assistant", "content": " six "},
]
REACT = [
    {"role": "user", "content": "How old is the tower?"},
    {"role": "thought", "content": "I should look it up."},
    {"role": "action", "content": "search(tower)"},
    {"role": "tool", "content": "built in 1173"},
    {"role": "assistant", "content": "850 years"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "été", "parameters": {"type": "object"}}}]
CALLS = [
    Message("user", "go"),
    Message("assistant", "", (ToolCall("1", "f", '{"a": "é"}'), ToolCall("2", "f", "{}"))),
    Message("tool", "done", tool_call_id="1"),
    Message("assistant", "all done"),
]
ROLE_PLAY = TemplateDesign(
    {
        **chatml_roles("elf", "wizard", others=("system", "user")),
        "narrator": RoleDesign("<|im_start|>* ", "<|im_end|>", "\n", is_trained=True, is_stripped=True),
    },
    default_system="A tale of an elf and a wizard.",
)


def designed(tokenizer: Tokenizer, design: TemplateDesign) -> Tokenizer:
    return tokenizer.with_chat_template(write_jinja(design))


def trained(tokenizer: Tokenizer, messages: list, tools=()) -> str:
    tokens = tokenizer.chat_tokens(messages, tools=tools)
    return tokenizer.decode([i for i, keep in zip(tokens.ids, tokens.assistant_mask, strict=True) if keep], False)


def test_chatml_is_chatml_and_trains_the_answers_with_their_end(house: Tokenizer):
    tokenizer = designed(house, DESIGNS["chatml"])
    for turns in (TALK, TALK[1:], TALK[:2]):
        assert tokenizer.render_chat(turns, add_generation_prompt=True) == house.render_chat(turns, True)
        assert tokenizer.chat_tokens(turns) == house.chat_tokens(turns), "the mask by marks is that by prompts"
    assert trained(tokenizer, TALK) == "4<|im_end|> six <|im_end|>"


def test_thoughts_actions_and_answers_are_trained_with_their_names(house: Tokenizer):
    tokenizer = designed(house, DESIGNS["react"])
    assert trained(tokenizer, REACT) == (
        "thought\nI should look it up.<|im_end|>action\nsearch(tower)<|im_end|>assistant\n850 years<|im_end|>"
    )
    assert tokenizer.render_chat(REACT[:1], add_generation_prompt=True).endswith("<|im_end|>\n<|im_start|>")
    assert {check.state for check in check_template(tokenizer, REACT)} <= {"ok", "none"}


def test_a_role_play_has_roles_of_its_own_and_a_default_setting(house: Tokenizer):
    tokenizer = designed(house, ROLE_PLAY)
    turns = [
        {"role": "user", "content": "Open the gate!"},
        {"role": "narrator", "content": "  The gate creaks. "},
        {"role": "elf", "content": "After you."},
    ]
    assert tokenizer.render_chat(turns) == (
        "<|im_start|>system\nA tale of an elf and a wizard.<|im_end|>\n<|im_start|>user\nOpen the gate!<|im_end|>\n"
        "<|im_start|>* The gate creaks.<|im_end|>\n<|im_start|>elf\nAfter you.<|im_end|>\n"
    )
    assert trained(tokenizer, turns) == "* The gate creaks.<|im_end|>elf\nAfter you.<|im_end|>"
    with pytest.raises(ConfigError, match="unknown role dwarf; known: system, user, elf, wizard, narrator"):
        tokenizer.render_chat([{"role": "dwarf", "content": "Hm."}])


def test_tools_are_offered_and_called(house: Tokenizer):
    tokenizer = designed(house, DESIGNS["chatml"])
    assert tokenizer.takes_tools and not house.takes_tools
    # ChatML without tools gets them as text from the caller: the design writes the same, but for the tool's own role.
    for turns in (CALLS[:2], [Message("system", "s"), *CALLS[:2]]):
        assert tokenizer.render_chat(turns, tools=TOOLS) == house.render_chat(turns, tools=TOOLS)
    assert trained(tokenizer, CALLS, TOOLS) == (
        '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>\n<tool_call>\n{"name": "f", "arguments": {}}'
        "\n</tool_call><|im_end|>all done<|im_end|>"
    )


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("kind", ["llama2", "llama3", "house"])
def test_every_design_passes_the_checks_with_every_tokenizer_that_has_its_tokens(name, kind, published, house):
    tokenizer = house if kind == "house" else load_tokenizer(published[kind])
    source = write_jinja(DESIGNS[name])
    if any(f"<|{part}" in source and f"<|{part}" not in "".join(tokenizer.special_ids) for part in ("im_", "start_h")):
        pytest.skip("the tokenizer lacks the design's tokens")
    if name == "plain" and kind == "house":
        source = source.replace("{{- bos_token -}}\n", "")
    found = check_template(tokenizer.with_chat_template(source), REACT if name == "react" else None)
    assert {check.state for check in found} <= {"ok", "none"}, found


word = st.text(st.sampled_from("ab <|>im_end\n'\"\\{}%é"), max_size=12)


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), word), max_size=4))
@settings(max_examples=80, deadline=None)
def test_the_mask_is_exactly_what_the_assistant_says(house: Tokenizer, turns: list):
    tokenizer = designed(house, DESIGNS["chatml"])
    messages = [{"role": role, "content": text} for role, text in turns]
    assert trained(tokenizer, messages) == "".join(f"{text}<|im_end|>" for role, text in turns if role == "assistant")


def test_designs_in_yaml(house: Tokenizer):
    file = build(DesignFile, {"like": "chatml", "roles": {"narrator": {"prefix": "<|im_start|>* ", "suffix": "."}}})
    assert list(file.design().roles) == ["system", "user", "tool", "assistant", "narrator"] and file.design().has_tools
    with pytest.raises(ConfigError, match="like is 'chatm'; known: chatml"):
        DesignFile(like="chatm").design()
    with pytest.raises(ConfigError, match="Did you mean roles.a.suffix"):
        build(DesignFile, {"roles": {"a": {"prefix": "", "sufix": ""}}})


@pytest.mark.parametrize(
    ("roles", "more", "message"),
    [
        ({"user": RoleDesign("U")}, {}, "No role of the design is trained"),
        ({"a": RoleDesign("A", is_trained=True)}, {}, "would never learn to stop"),
        (
            {"a": RoleDesign("A", ".", is_trained=True)},
            {"generation_prompt": "B"},
            "does not begin with the generation",
        ),
        ({"a b": RoleDesign("A", ".", is_trained=True)}, {}, "A role is called 'a b'"),
        ({"a": RoleDesign("A", ".", is_trained=True)}, {"default_system": "x"}, "no role system to write it"),
    ],
)
def test_unsound_designs_are_refused(roles, more, message):
    with pytest.raises(ConfigError, match=message):
        TemplateDesign(roles, **more)


def test_templates_are_saved_where_old_and_new_libraries_look(house: Tokenizer, tmp_path):
    source = write_jinja(DESIGNS["chatml"])
    house.save(tmp_path)
    save_template(source, tmp_path, in_config=True)
    assert load_tokenizer(tmp_path).chat_template == source
    (tmp_path / "chat_template.jinja").unlink()
    assert load_tokenizer(tmp_path).chat_template == source


def test_text_changed_after_it_was_marked_is_an_error_not_a_wrong_mask(house: Tokenizer):
    trimming = house.with_chat_template(
        "{% filter trim %}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{% endfilter %}"
    )
    assert trimming.render_chat([{"role": "assistant", "content": " a "}]) == "a"
    with pytest.raises(ConfigError, match="Apply the filter inside the block"):
        trimming.chat_tokens([{"role": "assistant", "content": " a "}])


@pytest.mark.peer
@pytest.mark.parametrize("name", [*DESIGNS, "role play"])
def test_transformers_renders_the_same_text_and_the_same_mask(name: str, house: Tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    design = {**DESIGNS, "role play": ROLE_PLAY}[name]
    kind = designed(house, design)
    kind.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    theirs.bos_token = theirs.bos_token or "<|endoftext|>"
    ours = Tokenizer(
        kind._backend, roles={**kind.roles, "bos_token": "<|endoftext|>"}, chat_template=kind.chat_template
    )
    talks = [TALK, TALK[1:], [{**turn, "content": "x"} for turn in TALK]]
    if name == "react":
        talks.append(REACT)
    if name == "role play":
        talks = [[{"role": role, "content": "c"} for role in ("user", "narrator", "elf")]]
    for talk in talks:
        for is_open in (False, True):
            text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=is_open)
            assert ours.render_chat(talk, add_generation_prompt=is_open) == text
        made = theirs.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        tokens = ours.chat_tokens(talk)
        if made["input_ids"] == tokens.ids:
            assert [bool(m) for m in made["assistant_masks"]] == tokens.assistant_mask
        else:  # the library lets a token span the prompt's end; ours are cut there, so that generation begins alike
            assert sum(tokens.assistant_mask) >= sum(made["assistant_masks"])
    if design.has_tools:
        calls = [
            {"role": "user", "content": "go"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}],
            },
            {"role": "tool", "content": "done"},
        ]
        assert ours.render_chat(calls, tools=TOOLS) == theirs.apply_chat_template(calls, tools=TOOLS, tokenize=False)


def test_the_template_is_valid_jinja_without_our_tag_too():
    for design in DESIGNS.values():
        source = write_jinja(design)
        plain = source.replace("{%- generation -%}\n", "").replace("{%- endgeneration -%}\n", "")
        assert "generation" in source
        jinja2.Environment().parse(plain)
