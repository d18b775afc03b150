"""A scaling-law study: a ladder of small runs, the law fitted to them, and its prediction checked on a larger run.

Each rung is one size trained on one amount of data, with a learning-rate schedule of its own length, and is judged by
its loss on text that is held out. The larger run has no part in the fit. A rung that is done is a file in ``OUT.run``:
a killed study goes on with the others, and takes up the rung that it was killed in from its checkpoint.

Source: Hoffmann et al. 2022, arXiv:2203.15556, section 3.3. Not done: a search of learning rates on each rung, which at
these sizes moves the loss by less than the next rung does; choosing the recipe's rate well is left to the reader.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelwright.base.artifact import new_artifact
from modelwright.base.config import to_dict
from modelwright.base.errors import ConfigError, DataError, MissingExtraError
from modelwright.base.files import atomic_file, read_json, write_json
from modelwright.base.progress import Stopwatch, console, human_count
from modelwright.data.load import RowLoader
from modelwright.data.pack import Rows, stream_rows
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.train.budget import count_parameters, flops_per_token
from modelwright.train.checkpoint import FREE_SETTINGS
from modelwright.train.finetune import mean_loss
from modelwright.train.loop import Hook, LoopConfig, train
from modelwright.train.objective import CausalLanguageModeling
from modelwright.train.scaling_law import FittedLaw, fit_law
from modelwright.train.supply import encode_documents

HEAD_DIM = 16  # small enough that the smallest rung has a head of its own


@dataclass(frozen=True)
class LadderConfig:
    """The sizes and amounts of data of a study; every size is trained on every amount."""

    widths: tuple[int, ...] = (16, 32, 48, 64)  # hidden sizes, multiples of 16
    num_layers: int = 2
    tokens: tuple[int, ...] = (125_000, 250_000, 500_000, 1_000_000)
    held_out_width: int = 96  # of the run that the fit is checked on
    held_out_tokens: int = 2_000_000
    max_validation_rows: int = 512
    num_resamples: int = 200

    def __post_init__(self) -> None:
        wrong = [width for width in (*self.widths, self.held_out_width) if width < HEAD_DIM or width % HEAD_DIM]
        if wrong:
            raise ConfigError(f"ladder.widths has {wrong[0]}; a width must be a multiple of {HEAD_DIM}.")
        if len(set(self.widths)) < 3 or len(set(self.tokens)) < 3:
            raise ConfigError(
                f"The ladder has {len(set(self.widths))} widths and {len(set(self.tokens))} amounts of tokens; a fit "
                "needs three of each. Give more."
            )
        if self.held_out_width <= max(self.widths) or self.held_out_tokens < max(self.tokens):
            raise ConfigError(
                f"The held-out run has width {self.held_out_width} and {self.held_out_tokens} tokens; it must be "
                f"larger than every rung ({max(self.widths)}, {max(self.tokens)}). Raise its width or tokens."
            )


@dataclass(frozen=True)
class ScalingConfig:
    """A study from a data set to a report."""

    data: Path  # data set folder with train.jsonl and validation.jsonl
    tokenizer: Path
    out: Path  # report folder to make
    max_seq_len: int = 128
    ladder: LadderConfig = field(default_factory=LadderConfig)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(compile=False))


@dataclass(frozen=True)
class Rung:
    """One run of the ladder and what it ended with."""

    width: int
    parameters: int
    tokens: int
    flops: float
    loss: float  # on held-out text, nats a token
    seconds: float


@dataclass(frozen=True)
class ScalingResult:
    """What a study found."""

    out: Path
    rungs: tuple[Rung, ...]
    held_out: Rung
    fitted: FittedLaw
    figures: dict[str, Any]


def run_scaling(config: ScalingConfig, hooks: Sequence[Hook] = ()) -> ScalingResult:
    """Run the ladder, fit the law, check it on the larger run, and write rungs, figures and plot as a report.

    Raises:
        DataError: The data set is missing or too small.
        ConfigError: An unfinished study in ``OUT.run`` has other settings.
    """
    work = config.out.with_name(config.out.name + ".run")
    _settle(config, work)
    tokenizer = load_tokenizer(config.tokenizer)
    documents = encode_documents(config.data, "train", tokenizer)
    held_text = encode_documents(config.data, "validation", tokenizer)
    held_rows = _first_rows(stream_rows(held_text, config.max_seq_len, tokenizer.eos_id, 0), config)
    ladder = config.ladder
    num_tokens = sum(map(len, documents))
    if ladder.held_out_tokens > 4 * num_tokens:
        raise DataError(
            f"The held-out run reads {ladder.held_out_tokens:,} tokens, and the data set has {num_tokens:,}: more than "
            "four passes, which the law does not describe. Give more text or fewer tokens."
        )
    wanted = [(width, tokens) for width in sorted(set(ladder.widths)) for tokens in sorted(set(ladder.tokens))]
    wanted.append((ladder.held_out_width, ladder.held_out_tokens))
    rungs = []
    for width, tokens in wanted:
        shape = _shape(width, config, tokenizer.vocab_size)
        loader = _loader(documents, config, tokenizer.eos_id)
        rungs.append(_climb(shape, tokens, config, loader, held_rows, work, hooks))
    result = _judge(config, rungs, num_tokens)
    with new_artifact(config.out, "report", settings=to_dict(config), parents=[config.data, config.tokenizer]) as made:
        folder, measured = made
        write_json(folder / "scaling.json", {"rungs": [asdict(rung) for rung in rungs], **result.figures})
        measured.update(result.figures)
        try:
            plot_scaling(result, folder / "scaling.png")
        except MissingExtraError as error:
            console.print(f"  no plot: {error}", markup=False)
    shutil.rmtree(work, ignore_errors=True)
    return result


def _settle(config: ScalingConfig, work: Path) -> None:
    file, settings = work / "settings.json", _deciding(to_dict(config))
    if file.is_file():
        kept = _deciding(read_json(file))
        changed = [name for name in sorted(settings | kept) if settings.get(name) != kept.get(name)]
        if changed:
            raise ConfigError(
                f"{work} holds an unfinished study with other settings of {', '.join(changed)}. Give it those of "
                f"{file}, or remove the folder."
            )
    write_json(file, settings)


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without those that do not change what is measured."""
    loop = {name: value for name, value in settings["loop"].items() if name not in FREE_SETTINGS}
    decided = {name: value for name, value in settings.items() if name != "out"}
    return {**decided, "loop": loop}


def _first_rows(rows: Rows, config: ScalingConfig) -> Rows:
    most = config.ladder.max_validation_rows
    return replace(rows, input_ids=rows.input_ids[:most], labels=rows.labels[:most])


def _shape(width: int, config: ScalingConfig, vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=-(-width * 8 // 3 // 16) * 16,
        num_layers=config.ladder.num_layers,
        num_heads=width // HEAD_DIM,
        max_seq_len=config.max_seq_len,
        tie_embeddings=True,
    )


def _loader(documents: list[np.ndarray], config: ScalingConfig, separator_id: int) -> RowLoader:
    seed = config.loop.seed * 100_003
    return RowLoader(
        lambda epoch: stream_rows(documents, config.max_seq_len, separator_id, seed + epoch),
        config.loop.micro_batch_size,
    )


def _climb(
    shape: LlamaConfig,
    tokens: int,
    config: ScalingConfig,
    loader: RowLoader,
    held_rows: Rows,
    work: Path,
    hooks: Sequence[Hook],
) -> Rung:
    """Return a rung, from its file where it was done before."""
    name = f"{shape.hidden_size}-{tokens}"
    file, folder = work / f"{name}.json", work / name
    if file.is_file():
        return Rung(**read_json(file))
    watch = Stopwatch()
    batch = config.loop.micro_batch_size * config.loop.grad_accum_steps * config.max_seq_len
    loop = replace(config.loop, num_steps=max(1, round(tokens / batch)))
    model = init_weights(Llama(shape), config.loop.seed)
    train(model, CausalLanguageModeling(), loader, loop, folder=folder, hooks=hooks, name=f"rung {name}")
    with torch.inference_mode():
        loss = mean_loss(model, held_rows, len(held_rows))
    assert loop.num_steps is not None
    seen, parameters = loop.num_steps * batch, count_parameters(shape)[1]
    flops = seen * flops_per_token(shape, config.max_seq_len)
    rung = Rung(shape.hidden_size, parameters, seen, flops, loss, watch.seconds)
    write_json(file, asdict(rung))
    shutil.rmtree(folder, ignore_errors=True)
    console.print(
        f"  {human_count(parameters):>7} parameters  {human_count(seen):>7} tokens  loss {loss:.4f}  "
        f"{watch.seconds:.0f} s"
    )
    return rung


def _judge(config: ScalingConfig, rungs: Sequence[Rung], num_tokens: int) -> ScalingResult:
    *ladder, last = rungs
    fitted = fit_law(
        [rung.parameters for rung in ladder],
        [rung.tokens for rung in ladder],
        [rung.loss for rung in ladder],
        num_resamples=config.ladder.num_resamples,
        seed=config.loop.seed,
    )
    expected, low, high = fitted.predict(last.parameters, last.tokens)
    constants = {
        name: {"value": value, "interval_90": fitted.interval([getattr(law, name) for law in fitted.resampled])}
        for name, value in asdict(fitted.law).items()
    }
    nearest = min(rung.loss for rung in ladder)
    figures = {
        "law": constants,
        "residual_of_log_loss": fitted.residual,
        "held_out": asdict(last),
        "predicted_loss": expected,
        "predicted_interval_90": (low, high),
        "prediction_error_fraction": expected / last.loss - 1,
        "best_rung_error_fraction": nearest / last.loss - 1,  # what one would be off by without a law
        "passes_over_the_data": last.tokens / num_tokens,
        "seconds": sum(rung.seconds for rung in rungs),
    }
    return ScalingResult(config.out, tuple(ladder), last, fitted, figures)


def plot_scaling(result: ScalingResult, out: Path) -> None:
    """Draw loss against FLOPs: the rungs by size, the fitted curves, the prediction with its bar, the larger run.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "Drawing a scaling law") from error
    figure = Figure(figsize=(7.6, 4.8))
    panel = figure.subplots()
    sizes = sorted({rung.parameters for rung in result.rungs})
    colors = ["#1f5c54", "#b3541e", "#4a4fa3", "#a02c5a", "#6b6b1f", "#2b6f9e", "#7a4b2a", "#444444"]
    for index, size in enumerate(sizes):
        color = colors[index % len(colors)]
        some = [rung for rung in result.rungs if rung.parameters == size]
        panel.plot([r.flops for r in some], [r.loss for r in some], "o", color=color, label=f"{human_count(size)}")
        ratio = some[0].flops / some[0].tokens
        tokens = np.geomspace(min(r.tokens for r in some) / 1.3, max(r.tokens for r in some) * 1.3, 40)
        panel.plot(ratio * tokens, [result.fitted.law.loss(size, d) for d in tokens], "-", color=color, linewidth=1)
    last = result.held_out
    expected, low, high = result.fitted.predict(last.parameters, last.tokens)
    spread = [[max(0.0, expected - low)], [max(0.0, high - expected)]]
    panel.errorbar([last.flops], [expected], yerr=spread, fmt="D", color="black", capsize=5, label="predicted, 90 %")
    panel.plot(
        [last.flops], [last.loss], "*", markersize=14, color="#d4a017", markeredgecolor="black", label="measured"
    )
    panel.set_xscale("log")
    panel.set_xlabel("FLOPs of training")
    panel.set_ylabel("held-out loss (nats a token)")
    panel.set_title(
        f"Rungs by parameters; the run of {human_count(last.parameters)} has no part in the fit", fontsize=10
    )
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8, ncols=2)
    figure.tight_layout()
    with atomic_file(out, "wb") as handle:
        figure.savefig(handle, format="png", dpi=130)
