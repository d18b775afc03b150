"""``mw template``: show what a chat template trains, check it, design one."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from modelwright.base.config import load
from modelwright.base.errors import DataError
from modelwright.base.progress import console
from modelwright.data.convert import detect_format, read_conversation, read_items
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.tokenizer.template_check import Piece, check_template, mask_pieces
from modelwright.tokenizer.template_design import DESIGNS, DesignFile, save_template, write_jinja

_STATES = {"ok": "[green]ok[/green]", "wrong": "[bold red]wrong[/bold red]", "none": "[dim]-[/dim]"}
_SAMPLE = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four."},
]
Folder = Annotated[Path, typer.Argument(help="Folder with tokenizer.json and a chat template.")]

template = typer.Typer(help="Show what a chat template trains, check it, design one.", no_args_is_help=True)


@template.command()
def show(
    tokenizer: Folder,
    data: Annotated[Path | None, typer.Option(help="Conversations in any known format; none: a sample.")] = None,
    num: Annotated[int, typer.Option(help="How many conversations.")] = 2,
) -> None:
    """Show conversations as training sees them: trained tokens green on black, special tokens bold."""
    known = load_tokenizer(tokenizer)
    talks = _talks(data, num) if data is not None else [(_SAMPLE, ())]
    for messages, tools in talks:
        pieces = mask_pieces(known, messages, tools)
        console.print(_colored(pieces))
        ids = known.chat_tokens(messages, tools=tools)
        console.print(f"[dim]{sum(ids.assistant_mask):,} of {len(ids.ids):,} tokens are trained[/dim]\n")


def _talks(data: Path, num: int) -> list[tuple[list, tuple]]:
    found: list[tuple[list, tuple]] = []
    for item in read_items(data):
        if len(found) == num:
            break
        if item.row is None:
            raise DataError(f"{item.where}: {item.reason}. Mend or remove it.")
        talk = read_conversation(item.row, detect_format(item.row, item.where), item.where)
        found.append(([*talk.messages, *talk.chosen], talk.tools))
    return found


def _colored(pieces: list[Piece]) -> Text:
    """Trained text stands in brackets too where there are no colours, so that a file shows it as well."""
    shown = Text()
    for piece in pieces:
        style = "bold " * piece.is_special + ("green on black" if piece.is_trained else "dim")
        is_bare = piece.is_trained and not console.is_terminal
        shown.append(f"⟦{piece.text}⟧" if is_bare else piece.text, style=style)
    return shown


@template.command()
def check(tokenizer: Folder) -> None:
    """Check the chat template of TOKENIZER; exit code 1 when something is wrong."""
    if not _print_checks(tokenizer):
        raise typer.Exit(1)


def _print_checks(folder: Path) -> bool:
    found = check_template(load_tokenizer(folder))
    for entry in found:
        console.print(f"  {_STATES[entry.state]:<26} {entry.name:<20} ", Text(entry.detail), soft_wrap=True)
    return all(entry.state != "wrong" for entry in found)


@template.command()
def design(
    out: Annotated[Path, typer.Argument(help="Tokenizer's folder that gets the template.")],
    file: Annotated[Path | None, typer.Option(help="Design as YAML; none: give --like.")] = None,
    like: Annotated[str | None, typer.Option(help=f"Start from {', '.join(DESIGNS)}.")] = None,
    in_config: Annotated[bool, typer.Option(help="Write it into tokenizer_config.json too.")] = False,
) -> None:
    """Write chat_template.jinja from a design, and check it."""
    settings = load(DesignFile, file, [f"--like={like}"] if like else [])
    save_template(write_jinja(settings.design()), out, in_config=in_config)
    console.print(f"[bold]{out}/chat_template.jinja[/bold]")
    if (out / "tokenizer.json").is_file() and not _print_checks(out):
        raise typer.Exit(1)
