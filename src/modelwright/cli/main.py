"""``mw``: finds the verb, runs it, and turns what goes wrong into one line and an exit code.

Only the verb that was asked for is imported, so that ``mw --help`` answers at once. Exit codes: 0 done, 1 an error that
the message explains, 2 the command was written wrongly, 3 done, but some input could not be used and was set aside, 130
interrupted.
"""

import difflib
import os
import sys
from dataclasses import dataclass
from typing import Any

from modelwright import __version__
from modelwright.base import env, heap
from modelwright.base.errors import ModelwrightError
from modelwright.base.registry import lookup


@dataclass(frozen=True)
class Verb:
    """One verb: where its function is, what it does, and how it is called."""

    target: str
    line: str
    example: str
    takes_settings: bool = False  # whether --section.field=value may follow, for the settings of what it runs


# In the order of a model's life. A new verb is one file in this folder and one entry here.
VERBS = {
    "quickstart": Verb(
        "modelwright.cli.quickstart:quickstart",
        "the whole life below, from a folder of documents to a served specialist that cites them",
        "mw quickstart my-docs/",
    ),
    "data": Verb(
        "modelwright.cli.data:data",
        "read, clean, deduplicate, redact and split documents; run pipelines; single steps on JSON lines",
        "mw data my-docs/ --out runs/data",
        takes_settings=True,
    ),
    "convert-chat": Verb(
        "modelwright.cli.convert_chat:convert_chat",
        "conversations, preference pairs and labels from one format to another",
        "mw convert-chat alpaca.json chats.jsonl --to messages",
    ),
    "synthesize": Verb(
        "modelwright.cli.synthesize:synthesize",
        "let a model write training data within a budget: tasks, questions, talks, preferences",
        "mw synthesize self-instruct --model runs/chat --seeds seeds.jsonl --out runs/tasks --num=200",
        takes_settings=True,
    ),
    "tokenizer": Verb(
        "modelwright.cli.tokenizer:tokenizer",
        "train a tokenizer (BPE, Unigram, WordPiece); compare several; audit one",
        "mw tokenizer train runs/data --out runs/tokenizer",
    ),
    "template": Verb(
        "modelwright.cli.template:template",
        "show what a chat template trains, in colour; check it; design one from roles",
        "mw template show runs/chat",
    ),
    "shards": Verb(
        "modelwright.cli.shards:shards",
        "encode the texts of data sets once, into token shards that runs read from disk",
        "mw shards runs/data --tokenizer runs/tokenizer --out runs/tokens",
    ),
    "plan": Verb(
        "modelwright.cli.plan:plan",
        "say what a training run will cost: memory by part, FLOPs, time on this machine",
        "mw plan recipes/pretrain/small.yaml",
        takes_settings=True,
    ),
    "train": Verb(
        "modelwright.cli.train:train",
        "pre-train or fine-tune as a recipe says",
        "mw train recipes/pretrain/small.yaml --minutes=10",
        takes_settings=True,
    ),
    "tune": Verb(
        "modelwright.cli.tune:tune",
        "search a recipe's settings by short runs, on Optuna or a Ray cluster",
        "mw tune recipes/pretrain/small.yaml --space space.yaml --trials 20",
        takes_settings=True,
    ),
    "look": Verb(
        "modelwright.cli.look:look",
        "see optimizers move, activations spread and attention look: pictures, or a page",
        "mw look attention runs/base --text 'The dog sleeps.' --out attention.png",
    ),
    "selfcheck": Verb(
        "modelwright.cli.selfcheck:selfcheck",
        "change what must not change a training run's result, at toy size, and compare",
        "mw selfcheck recipes/pretrain/small.yaml",
        takes_settings=True,
    ),
    "pull": Verb(
        "modelwright.cli.pull:pull",
        "fetch a published model from the hub: safetensors, config, tokenizer",
        "mw pull HuggingFaceTB/SmolLM2-135M --to runs/smol",
    ),
    "inspect": Verb(
        "modelwright.cli.inspect:inspect",
        "say what a model on disk is: parameters by part, dtypes, memory, cache at each context",
        "mw inspect runs/base",
    ),
    "reshape": Verb(
        "modelwright.cli.reshape:reshape",
        "give a model fewer key/value heads, more layers or more tokens, and say what it cost",
        "mw reshape runs/base runs/shared-heads --kv-heads 1 --data runs/data",
    ),
    "quantize": Verb(
        "modelwright.cli.quantize:quantize",
        "make a model smaller, and say what it lost",
        "mw quantize runs/base --bits 4 --out runs/int4",
    ),
    "convert": Verb(
        "modelwright.cli.convert:convert",
        "write a model in another format: a Hugging Face folder or GGUF",
        "mw convert model.gguf runs/model --to hf",
    ),
    "index": Verb(
        "modelwright.cli.index:index",
        "make documents searchable: BM25 and sentence vectors side by side",
        "mw index my-docs/ --out runs/index",
        takes_settings=True,
    ),
    "ask": Verb(
        "modelwright.cli.ask:ask",
        "answer a question from an index, with numbered citations",
        "mw ask runs/index 'What does dedent do?'",
    ),
    "eval": Verb(
        "modelwright.cli.eval:evaluate",
        "measure a model (bits per byte beside n-grams) or an index (recall, MRR)",
        "mw eval runs/base --data runs/data",
    ),
    "chat": Verb(
        "modelwright.cli.chat:chat",
        "talk to a model in the terminal",
        "mw chat runs/chat",
    ),
    "keys": Verb(
        "modelwright.cli.keys:keys",
        "make an API key with scopes and limits for mw serve",
        "mw keys alice --file keys.yaml --requests-per-minute 60",
    ),
    "serve": Verb(
        "modelwright.cli.serve:serve",
        "the OpenAI-compatible server and the web page",
        "mw serve runs/chat --index runs/index",
    ),
    "costs": Verb(
        "modelwright.cli.costs:costs",
        "what the gateway to other services has spent, by tenant and endpoint",
        "mw costs costs.sqlite --html costs.html",
    ),
    "replay": Verb(
        "modelwright.cli.replay:replay",
        "compute the requests of a server's trace again: the same tokens, or where they part",
        "mw replay trace.jsonl runs/chat",
    ),
    "lineage": Verb(
        "modelwright.cli.lineage:lineage",
        "walk from an artifact back to the documents it was made from",
        "mw lineage runs/index",
    ),
}

ADAPTERS = "--adapters"  # takes several NAME=DIR; typer knows an option only once for each value
TRAINING = ("train", "tune", "quickstart")  # verbs that hold the memory of a training step


def run() -> None:
    """Run the command line of this process and exit."""
    if sys.argv[1:2] and sys.argv[1] in TRAINING:
        heap.let_holes_join()
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def main(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print_help()
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"modelwright {__version__}")
        return 0
    name = arguments[0]
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(VERBS)}."
        return _complain(f"{name!r} is not a verb of mw. {hint} `mw --help` shows them all.", 2)
    try:
        return _run_verb(name, spread(arguments[1:]))
    except ModelwrightError as error:
        if env.read("MODELWRIGHT_DEBUG"):
            raise
        return _complain(str(error), 1)
    except KeyboardInterrupt:
        return _complain("interrupted; what was finished is kept.", 130)


def spread(arguments: list[str]) -> list[str]:
    """Repeat the flag before each of several adapters that stand behind it.

    >>> spread(["model", "--adapters", "law=a", "poems=b", "--port", "1"])
    ['model', '--adapters', 'law=a', '--adapters', 'poems=b', '--port', '1']
    """
    made: list[str] = []
    for argument in arguments:
        is_next = len(made) > 1 and made[-2] == ADAPTERS and "=" in argument and not argument.startswith("-")
        made += [ADAPTERS, argument] if is_next else [argument]
    return made


def _run_verb(name: str, arguments: list[str]) -> int:
    # Typer carries click inside in some versions and depends on it in others; its own class leads to the right one.
    import typer

    usage_error: Any = typer.BadParameter.__mro__[1]
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    is_open = VERBS[name].takes_settings
    open_context = {"allow_extra_args": True, "ignore_unknown_options": True} if is_open else None
    verb = lookup({known: entry.target for known, entry in VERBS.items()}, name, "verb")
    epilog = f"Example: {VERBS[name].example}"
    if isinstance(verb, typer.Typer):  # a verb of several
        verb.pretty_exceptions_enable, verb.info.epilog = False, epilog
    else:
        app.command(name, context_settings=open_context, epilog=epilog)(verb)
    command = typer.main.get_command(verb if isinstance(verb, typer.Typer) else app)
    if is_open and (unknown := _unknown_flag(arguments, _part_of(command, arguments))):
        return _complain(f"{unknown} `mw {name} --help` shows what it takes.", 2)
    try:
        with command.make_context(f"mw {name}", arguments) as context:
            command.invoke(context)
    except usage_error as error:
        said = error.format_message().rstrip(". ")
        return _complain(f"{said}. `mw {name} --help` shows what it takes.", 2)
    except typer.Exit as end:
        return end.exit_code
    return 0


def _part_of(command: Any, arguments: list[str]) -> Any:
    """Return the command that the arguments are for: of a verb of several the part that is named, or its default."""
    parts = getattr(command, "commands", None)
    if not parts:
        return command
    name = arguments[0] if arguments and arguments[0] in parts else command.default_part
    return parts[name]


def _unknown_flag(arguments: list[str], command: Any) -> str:
    """Say which flag a verb that takes settings does not know; ``--name=value`` is left to the settings."""
    if not command.context_settings.get("ignore_unknown_options"):
        return ""
    known = ["--help", *(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))]
    for argument in arguments:
        if argument.startswith("-") and "=" not in argument and argument not in known:
            near = difflib.get_close_matches(argument, [name for name in known if name.startswith("-")], n=1)
            hint = f"Did you mean {near[0]}?" if near else "A setting is written --section.field=value."
            return f"No such option: {argument}. {hint}"
    return ""


def _complain(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def print_help() -> None:
    """Print every verb with one line and an example."""
    bold, dim, end = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")
    print(f"{bold}modelwright {__version__}{end}: the whole life of a language model, from documents to answers.\n")
    print(f"{bold}mw VERB{end} ..., in the order of that life (`mw VERB --help` says more):\n")
    for name, verb in VERBS.items():
        print(f"  {bold}{name:<11}{end} {verb.line}\n  {'':<11} {dim}{verb.example}{end}")
    print("\nEverything made is a folder with a manifest.json; a killed command run again goes on where it can.")
