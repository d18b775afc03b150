"""Chat templates designed, not programmed: a description of each role becomes a Jinja template of the ecosystem.

A role has a text before and after what it says, and is trained or not. The template carries ``{% generation %}`` marks
around what is trained, writes an unknown role as an error instead of leaving it out, and renders the same here and in
``transformers``. Besides system, user, assistant and tool, any role may be named: thought and action for an agent,
narrator and characters for a role play.

The one rule: what the generation prompt writes is never trained, all that the model must write is. With several trained
roles the prompt is what their prefixes share, so that the model itself says whether it thinks, acts or answers.

Source: the ``generation`` tag of ``transformers`` (apply_chat_template, return_assistant_tokens_mask); Yao et al. 2023,
arXiv:2210.03629 (ReAct) for thought and action. Tools are offered and called in the form of `tokenizer.tool_text`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from modelwright.base.errors import ConfigError
from modelwright.base.files import atomic_file, read_json, write_json
from modelwright.tokenizer.tool_text import SECTION

BOS, EOS = "{bos}", "{eos}"  # in the texts of a design: the tokenizer's own special tokens


@dataclass(frozen=True)
class RoleDesign:
    """How one role's turns are written."""

    prefix: str  # before what it says
    suffix: str = ""  # after it; trained when the role is, so the token that ends a turn belongs here
    after: str = ""  # between turns, never trained
    is_trained: bool = False  # whether the model learns to write this role's turns
    is_stripped: bool = False  # whether blanks around what it says are taken away


@dataclass(frozen=True)
class TemplateDesign:
    """A chat template, described."""

    roles: dict[str, RoleDesign]  # by the name that messages carry
    begin: str = ""  # once, before everything; {bos} and {eos} stand for the tokenizer's own, in all texts here
    generation_prompt: str | None = None  # opens the model's turn; None: what the prefixes of trained roles share
    default_system: str | None = None  # a system turn where the conversation has none
    has_tools: bool = False  # whether tools are offered and called; otherwise Hermes-style text is put in by the caller

    def __post_init__(self) -> None:
        trained = self.trained
        if not trained:
            raise ConfigError(
                f"No role of the design is trained ({', '.join(self.roles) or 'none given'}). "
                "Set is_trained on what the model writes, most often the assistant."
            )
        wrong = next((name for name in self.roles if not name.isidentifier()), None)
        if wrong is not None:
            raise ConfigError(f"A role is called {wrong!r}; expected a plain word. Rename it.")
        for name, role in trained.items():
            if not role.suffix:
                raise ConfigError(
                    f"The role {name} is trained, but its suffix is empty: the model would never learn to stop. "
                    "Put the token that ends a turn there."
                )
            if not role.prefix.startswith(self.prompt):
                raise ConfigError(
                    f"The prefix of the role {name} is {role.prefix!r} and does not begin with the generation prompt "
                    f"{self.prompt!r}: what is trained would not be what is generated. Let it begin so."
                )
        for name, text in (("default_system", self.default_system), ("has_tools", self.has_tools or None)):
            if text is not None and "system" not in self.roles:
                raise ConfigError(f"{name} is set, but there is no role system to write it. Add one.")

    @property
    def trained(self) -> dict[str, RoleDesign]:
        """The roles that the model writes."""
        return {name: role for name, role in self.roles.items() if role.is_trained}

    @property
    def prompt(self) -> str:
        """What opens the model's turn."""
        if self.generation_prompt is not None:
            return self.generation_prompt
        return os.path.commonprefix([role.prefix for role in self.trained.values()])


def chatml_roles(*trained: str, others: tuple[str, ...] = ("system", "user", "tool")) -> dict[str, RoleDesign]:
    """Return roles in ChatML's form, ``<|im_start|>name``, a new line, what is said, ``<|im_end|>``, a new line."""
    return {
        name: RoleDesign(f"<|im_start|>{name}\n", "<|im_end|>", "\n", is_trained=name in trained)
        for name in (*others, *trained)
    }


DESIGNS = {
    "chatml": TemplateDesign(chatml_roles("assistant"), has_tools=True),
    "react": TemplateDesign(chatml_roles("thought", "action", "assistant"), generation_prompt="<|im_start|>"),
    "llama3": TemplateDesign(
        {
            name: RoleDesign(
                f"<|start_header_id|>{name}<|end_header_id|>\n\n", "<|eot_id|>", "", name == "assistant", True
            )
            for name in ("system", "user", "assistant", "tool")
        },
        begin=BOS,
    ),
    "plain": TemplateDesign(
        {
            "system": RoleDesign("", after="\n\n"),
            "user": RoleDesign("User: ", after="\n\n"),
            "assistant": RoleDesign("Assistant: ", EOS, "\n\n", is_trained=True),
        },
        begin=BOS,
        generation_prompt="Assistant:",
    ),
}


def write_jinja(design: TemplateDesign) -> str:
    """Return the Jinja text of a design."""
    system = design.roles.get("system")
    lines = [f"{{{{- {_texts(design.begin)} -}}}}"] if design.begin else []
    if design.has_tools:
        lines += _tool_lines()
    if system is not None and (design.default_system is not None or design.has_tools):
        lines += _opening_lines(system, design)
    lines.append("{%- for message in messages -%}")
    for number, (name, role) in enumerate(design.roles.items()):
        lines.append(f"{{%- {'elif' if number else 'if'} message['role'] == {_quote(name)} -%}}")
        lines += _turn_lines(name, role, design)
    known = ", ".join(design.roles)
    lines += [
        "{%- else -%}",
        f"{{{{- raise_exception('unknown role ' ~ message['role'] ~ '; known: {known}') -}}}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}",
        f"{{{{- {_texts(design.prompt)} -}}}}",
        "{%- endif -%}",
    ]
    return "\n".join(lines) + "\n"


def _tool_lines() -> list[str]:
    before, after = SECTION.replace("{{", "{").replace("}}", "}").split("{tools}")
    return [
        "{%- set offer = namespace(text='') -%}",
        "{%- if tools -%}",
        f"{{%- set offer.text = {_quote(before.removesuffix(chr(10)))} -%}}",
        "{%- for tool in tools -%}{%- set offer.text = offer.text ~ '\\n' ~ (tool | tojson) -%}{%- endfor -%}",
        f"{{%- set offer.text = offer.text ~ {_quote(after)} -%}}",
        "{%- endif -%}",
    ]


def _opening_lines(system: RoleDesign, design: TemplateDesign) -> list[str]:
    """A system turn where the conversation brings none: the default text, the tools on offer, or both."""
    default = design.default_system or ""
    parts = [_quote(default)] if default else []
    if design.has_tools:
        parts.append("('\\n\\n' if offer.text else '') ~ offer.text" if default else "offer.text")
    condition = "not messages or messages[0]['role'] != 'system'"
    if design.has_tools and not default:
        condition = f"offer.text and ({condition})"
    turn = [_texts(system.prefix), *(f"({part})" for part in parts), _texts(system.suffix), _texts(system.after)]
    return [f"{{%- if {condition} -%}}", f"{{{{- {_sum(turn)} -}}}}", "{%- endif -%}"]


def _turn_lines(name: str, role: RoleDesign, design: TemplateDesign) -> list[str]:
    said = "(message['content'] or '')" + (" | trim" if role.is_stripped else "")
    said = f"({said})" if role.is_stripped else said
    if name == "system" and design.has_tools:
        said = f"{said} ~ ('\\n\\n' ~ offer.text if offer.text and loop.first else '')"
        said = f"({said})"
    prompt = design.prompt if role.is_trained else role.prefix
    rest = role.prefix[len(prompt) :]
    lines = [f"{{{{- {_texts(prompt)} -}}}}"] if prompt and role.is_trained else []
    calls = _call_lines() if role.is_trained and design.has_tools else []
    if role.is_trained:
        lines += ["{%- generation -%}", f"{{{{- {_sum([_texts(rest), said])} -}}}}", *calls]
        lines += [f"{{{{- {_texts(role.suffix)} -}}}}", "{%- endgeneration -%}"]
        return lines + ([f"{{{{- {_texts(role.after)} -}}}}"] if role.after else [])
    return [f"{{{{- {_sum([_texts(role.prefix), said, _texts(role.suffix), _texts(role.after)])} -}}}}"]


def _call_lines() -> list[str]:
    """Calls of tools as Hermes and Qwen write them; arguments given as a text are written as they are."""
    return [
        "{%- for call in message['tool_calls'] or [] -%}",
        "{%- set function = call['function'] if call['function'] is defined else call -%}",
        "{{- ('\\n' if message['content'] or not loop.first else '') ~ '<tool_call>\\n{\"name\": ' ~ "
        "(function['name'] | tojson) ~ ', \"arguments\": ' -}}",
        "{{- function['arguments'] if function['arguments'] is string else (function['arguments'] | tojson) -}}",
        "{{- '}\\n</tool_call>' -}}",
        "{%- endfor -%}",
    ]


def _sum(parts: list[str]) -> str:
    return " ~ ".join(part for part in parts if part not in ("", "''")) or "''"


def _texts(text: str) -> str:
    """Return a text as a Jinja expression; the places of the tokenizer's own tokens are its variables."""
    parts: list[str] = []
    for number, piece in enumerate(text.replace(BOS, f"\0{BOS}\0").replace(EOS, f"\0{EOS}\0").split("\0")):
        variable = {BOS: "bos_token", EOS: "eos_token"}.get(piece) if number % 2 else None
        if variable or piece:
            parts.append(variable or _quote(piece))
    return " ~ ".join(parts) or "''"


def _quote(text: str) -> str:
    """Return a text as a Jinja string."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def save_template(source: str, folder: Path, *, in_config: bool = False) -> None:
    """Write a template into a tokenizer's or model's folder, as ``chat_template.jinja``.

    Args:
        source: The Jinja text.
        folder: With ``tokenizer_config.json`` or without.
        in_config: Write it into ``tokenizer_config.json`` too, where libraries before 2025 look for it.
    """
    folder = Path(folder)
    with atomic_file(folder / "chat_template.jinja") as handle:
        handle.write(source)
    if in_config:
        file = folder / "tokenizer_config.json"
        config: Mapping[str, object] = read_json(file) if file.is_file() else {}
        write_json(file, {**config, "chat_template": source})


@dataclass(frozen=True)
class DesignFile:
    """A design as a YAML file spells it: one of those known here, or roles of one's own."""

    like: str | None = None  # chatml, react, llama3 or plain; None: roles are given
    roles: dict[str, RoleDesign] = field(default_factory=dict)  # added to those of like, or in their place
    begin: str | None = None  # None: as like
    generation_prompt: str | None = None  # None: as like, or what the prefixes of trained roles share
    default_system: str | None = None  # None: as like
    has_tools: bool | None = None  # None: as like

    def design(self) -> TemplateDesign:
        """Return the design that it spells.

        Raises:
            ConfigError: ``like`` is not known, or the design is not sound.
        """
        if self.like is not None and self.like not in DESIGNS:
            raise ConfigError(f"like is {self.like!r}; known: {', '.join(DESIGNS)}.")
        base = DESIGNS.get(self.like or "")
        names = ("begin", "generation_prompt", "default_system", "has_tools")
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if base is None:
            return TemplateDesign(self.roles, **own)
        kept = {name: getattr(base, name) for name in names}
        return TemplateDesign({**base.roles, **self.roles}, **{**kept, **own})
