"""``mw look``: see what optimizers, activations and attention do, as pictures or as a page."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from modelwright.base.errors import ConfigError
from modelwright.base.progress import console
from modelwright.models.weights import load_model
from modelwright.serve.app import serve as run_server
from modelwright.serve.look_app import create_look_app
from modelwright.serve.port import check_port
from modelwright.studio import PAGE
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.train.look import look_at_activations, look_at_attention, plot_activations, plot_attention
from modelwright.train.paths import RULES, SURFACES, plot_paths

look = typer.Typer(no_args_is_help=True, add_completion=False, help="See what happens in training and in a model.")
Model = Annotated[Path, typer.Argument(help="A model folder.")]
Out = Annotated[Path, typer.Option(help="The PNG to write.")]
Text = Annotated[str, typer.Option(help="What the model reads.")]
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on."


@look.command()
def optimizers(
    out: Out = Path("optimizers.png"),
    surface: Annotated[str, typer.Option(help=f"One of {', '.join(SURFACES)}.")] = "rosenbrock",
    rules: Annotated[str, typer.Option(help="Joined by commas.")] = ",".join(RULES),
    steps: Annotated[int, typer.Option(help="How many.")] = 200,
    learning_rate: Annotated[float | None, typer.Option(help="For all; none: one that suits each.")] = None,
) -> None:
    """Draw the paths of optimizers over a surface of two variables."""
    plot_paths(surface, rules.split(","), out, steps, learning_rate)
    console.print(f"[bold]{out}[/bold]")


@look.command()
def activations(model: Model, out: Out = Path("activations.png"), text: Text = TEXT) -> None:
    """Draw histograms of each layer's activations over a text, and count units that never act."""
    read, ids, _ = _read(model, text)
    layers = look_at_activations(read, ids)
    plot_activations(layers, out)
    dead = sum(layer.num_dead for layer in layers if "units" in layer.name)
    console.print(f"[bold]{out}[/bold]  {dead} feed-forward units are dead on these {ids.shape[1]} tokens")


@look.command()
def attention(
    model: Model,
    out: Out = Path("attention.png"),
    text: Text = TEXT,
    layer: Annotated[int, typer.Option(help="Which one; -1: the last.")] = 0,
) -> None:
    """Draw what each head of a layer attends to in a text."""
    read, ids, tokens = _read(model, text)
    plot_attention(look_at_attention(read, ids), tokens, out, layer)
    console.print(f"[bold]{out}[/bold]")


@look.command()
def page(
    model: Annotated[Path | None, typer.Argument(help="A model folder; none: optimizers alone.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8100,
) -> None:
    """Serve a page that shows the three, until interrupted."""
    check_port(host, port)
    app = create_look_app(
        PAGE,
        model=None if model is None else load_model(model, dtype=torch.float32),
        tokenizer=None if model is None else load_tokenizer(model),
        name="" if model is None else model.resolve().name,
    )
    console.print(f"[bold]http://{host}:{port}/[/bold]  the page. Ctrl-C ends.")
    try:
        run_server(app, host, port)
    except KeyboardInterrupt:  # Ctrl-C is how a server is meant to end
        console.print("stopped")


def _read(folder: Path, text: str) -> tuple[Any, torch.Tensor, list[str]]:
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    ids = tokenizer.encode(text)
    if not ids:
        raise ConfigError("The text has no token. Give some words with --text.")
    return model, torch.tensor([ids]), [tokenizer.decode([one]) for one in ids]
