"""Where the figures of a run are written: MLflow, Weights & Biases, TensorBoard, or our own JSON lines and CSV.

A tracker is a hook of the loop: it takes the figures of every step, and at the end draws loss, gradient norm and
learning rate as one PNG. With nothing named, figures go to MLflow in a local folder where it is installed, and else to
our own files, which is said once. Nothing leaves the machine unless a service is named and configured to
(WANDB_MODE=offline keeps Weights & Biases local too). Our own files are written always: plots are drawn from them, and
a run that is taken up again goes on in them, steps that are done twice counting once.

Not here: uploading models.
"""

import csv
import json
import math
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from modelwright.base.errors import ConfigError, MissingExtraError
from modelwright.base.files import atomic_file, read_jsonl, write_jsonl
from modelwright.base.progress import console
from modelwright.base.registry import lookup
from modelwright.train import TRACKERS
from modelwright.train.speed import Speedometer

if TYPE_CHECKING:
    from modelwright.train.loop import Run
    from modelwright.train.objective import StepReport

Sampler = Callable[[Any], Sequence[str]]
MAX_PARAMS = 100  # settings that MLflow takes at once


@dataclass(frozen=True)
class TrackingConfig:
    """Where figures go, and how often."""

    to: tuple[str, ...] | None = None  # of mlflow, wandb, tensorboard, files; None: mlflow where installed, else files
    every: int = 1  # steps between two rows
    project: str = "modelwright"  # MLflow's experiment, Weights & Biases' project
    name: str | None = None  # of the run; None: that of the model folder
    folder: Path | None = None  # None: the model folder's name with -tracking
    plots: bool = True  # draw loss, gradient norm and learning rate at the end, where matplotlib is installed
    samples_every: int | None = None  # steps between two samples of text; None: none
    sample_prompts: tuple[str, ...] = ("",)
    show_batches: int = 2  # of the first, printed decoded with what is trained in colour; 0: none

    def __post_init__(self) -> None:
        for name in self.to or ():
            if name != "files":
                lookup(TRACKERS, name, "tracking.to")
        if self.every < 1 or (self.samples_every is not None and self.samples_every < 1) or self.show_batches < 0:
            raise ConfigError(
                f"tracking.every is {self.every}, samples_every {self.samples_every}, show_batches {self.show_batches}"
                "; steps must be at least 1, batches at least 0."
            )


class Sink(Protocol):
    """One place that figures are written to."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of one step; all are finite."""
        ...

    def text(self, step: int, text: str) -> None:
        """Write a sample of text."""
        ...

    def close(self, plots: Sequence[Path]) -> None:
        """End the run; take its plots where the place holds files."""
        ...


class MlflowSink:
    """An MLflow run in a local SQLite file: ``mlflow ui --backend-store-uri sqlite:///FOLDER/mlflow.db`` shows it."""

    def __init__(self, folder: Path, config: TrackingConfig, name: str, settings: Mapping[str, Any]):
        try:
            import mlflow
        except ImportError as error:
            raise MissingExtraError("mlflow", "mlflow", "tracking.to: mlflow") from error
        self._client = mlflow.MlflowClient(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        found = self._client.get_experiment_by_name(config.project)
        place = (folder / "mlflow-artifacts").resolve().as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(config.project, place)
        self._run = self._client.create_run(experiment, run_name=name).info.run_id
        params = [mlflow.entities.Param(key, str(value)[:500]) for key, value in settings.items()]
        for start in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(self._run, params=params[start : start + MAX_PARAMS])
        self._metric = mlflow.entities.Metric

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of one step, in one transaction: one each took four times as long."""
        now = round(time.time() * 1000)
        metrics = [self._metric(key, value, now, step) for key, value in figures.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def text(self, step: int, text: str) -> None:
        """Write a sample of text."""
        self._client.log_text(self._run, text, f"samples/{step:07}.txt")

    def close(self, plots: Sequence[Path]) -> None:
        """End the run."""
        for plot in plots:
            self._client.log_artifact(self._run, str(plot))
        self._client.set_terminated(self._run)


class WandbSink:
    """A run of Weights & Biases; with WANDB_MODE=offline its files stay in the tracking folder."""

    def __init__(self, folder: Path, config: TrackingConfig, name: str, settings: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError("wandb", "wandb", "tracking.to: wandb") from error
        self._wandb = wandb
        self._run = wandb.init(project=config.project, name=name, dir=str(folder), config=dict(settings))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of one step."""
        self._run.log(dict(figures), step=step)

    def text(self, step: int, text: str) -> None:
        """Write a sample of text."""
        self._run.log(
            {"sample": self._wandb.Html(f"<pre>{text.replace('&', '&amp;').replace('<', '&lt;')}</pre>")}, step
        )

    def close(self, plots: Sequence[Path]) -> None:
        """End the run."""
        for plot in plots:
            self._run.log({plot.stem: self._wandb.Image(str(plot))})
        self._run.finish()


class TensorBoardSink:
    """Event files that ``tensorboard --logdir FOLDER/tensorboard`` reads."""

    def __init__(self, folder: Path, config: TrackingConfig, name: str, settings: Mapping[str, Any]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tensorboard", "tracking.to: tensorboard") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of one step."""
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)

    def text(self, step: int, text: str) -> None:
        """Write a sample of text."""
        self._writer.add_text("sample", text, step)

    def close(self, plots: Sequence[Path]) -> None:
        """End the run."""
        self._writer.close()


class Tracker:
    """A hook of the loop that writes what each step did to every place of the settings.

    Args:
        folder: Where our own files and local stores go; made if it is missing.
        config: Where and how often.
        name: Of the run.
        settings: Of the run, flat, for the services' tables.
        sampler: From the model in training to samples of text; None: none are taken.
    """

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        name: str,
        settings: Mapping[str, Any] | None = None,
        sampler: Sampler | None = None,
    ):
        self.folder, self.config, self._sampler = folder, config, sampler
        folder.mkdir(parents=True, exist_ok=True)
        self._sinks = open_sinks(folder, config, config.name or name, settings or {})
        self.rows: list[dict[str, float]] = list(read_jsonl(folder / "steps.jsonl")) if self._file.is_file() else []
        self._meter: Speedometer | None = None

    @property
    def _file(self) -> Path:
        return self.folder / "steps.jsonl"

    def __call__(self, run: "Run", report: "StepReport") -> None:
        """Take the figures of a step."""
        if self._meter is None:
            self._meter = Speedometer(run)
            kept = [row for row in self.rows if row["step"] < report.step]  # steps after the checkpoint are done again
            write_jsonl(self._file, kept)
            self.rows = kept
        if report.step % self.config.every == 0 or report.step == run.num_steps:
            self._write(report, self._meter.figures(report))
        every = self.config.samples_every
        if every and self._sampler is not None and (report.step % every == 0 or report.step == run.num_steps):
            self._sample(run, report.step)

    def _write(self, report: "StepReport", speed: Mapping[str, float]) -> None:
        figures = {
            "loss": report.loss,
            "gradient_norm": report.gradient_norm,
            "learning_rate": report.learning_rate,
            "seconds": report.seconds,
            "is_skipped": float(report.is_skipped),
            **speed,
        }
        finite = {key: float(value) for key, value in figures.items() if math.isfinite(value)}
        row = {"step": report.step, **finite}
        self.rows.append(row)
        with self._file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
        for sink in self._sinks:
            sink.log(report.step, finite)

    def _sample(self, run: "Run", step: int) -> None:
        assert self._sampler is not None
        run.model.eval()
        try:
            samples = self._sampler(run.model)
        finally:
            run.model.train()
        for text in samples:
            with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n")
            for sink in self._sinks:
                sink.text(step, text)

    def close(self) -> list[Path]:
        """Write the CSV and the plots, end the runs of all services, and return the plots."""
        _write_csv(self.rows, self.folder / "steps.csv")
        plots = []
        if self.config.plots and self.rows:
            try:
                plot_steps(self.rows, self.folder / "training.png")
                plots.append(self.folder / "training.png")
                if (samples := self.folder / "samples.jsonl").is_file():
                    plot_samples(list(read_jsonl(samples)), self.folder / "samples.png")
                    plots.append(self.folder / "samples.png")
            except MissingExtraError as error:
                console.print(f"  no plot: {error}", markup=False)
        for sink in self._sinks:
            sink.close(plots)
        return plots


def open_sinks(folder: Path, config: TrackingConfig, name: str, settings: Mapping[str, Any]) -> list[Sink]:
    """Return the services that are named; with none named, MLflow where it is installed.

    Raises:
        MissingExtraError: A service is named whose package is not installed.
    """
    if config.to is not None:
        names = [one for one in config.to if one != "files"]
        return [lookup(TRACKERS, one, "tracking.to")(folder, config, name, settings) for one in names]
    try:
        return [MlflowSink(folder, config, name, settings)]
    except MissingExtraError:
        console.print(
            f"  tracking: MLflow is not installed (pip install 'modelwright[mlflow]'); "
            f"figures go to {folder}/steps.jsonl",
            markup=False,  # what stands in brackets is the extra's name
        )
        return []


def _write_csv(rows: Sequence[Mapping[str, float]], out: Path) -> None:
    names = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_file(out) as handle:
        writer = csv.DictWriter(handle, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot_steps(rows: Sequence[Mapping[str, float]], out: Path) -> None:
    """Draw loss (with its running mean), gradient norm and learning rate over the steps, as a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "Drawing a run") from error
    figure = Figure(figsize=(7.6, 7.2))
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    kinds = (("loss", "loss (nats)", "#1f5c54"), ("gradient_norm", "gradient norm", "#b3541e"))
    for panel, (key, label, color) in zip(panels, (*kinds, ("learning_rate", "learning rate", "#4a4fa3")), strict=True):
        shown = [(row["step"], row[key]) for row in rows if key in row]
        steps, values = [step for step, _ in shown], [value for _, value in shown]
        is_noisy = key != "learning_rate" and len(values) > 20
        panel.plot(steps, values, color=color, linewidth=0.8 if is_noisy else 1.6, alpha=0.45 if is_noisy else 1.0)
        if is_noisy:
            mean, means = values[0], []
            for value in values:
                mean += 0.1 * (value - mean)
                means.append(mean)
            panel.plot(steps, means, color=color, linewidth=1.8, label="running mean")
            panel.legend(frameon=False, fontsize=8)
        panel.set_ylabel(label)
        panel.spines[["top", "right"]].set_visible(False)
    if any(row.get("gradient_norm", 0) > 0 for row in rows):
        panels[1].set_yscale("log")
    panels[-1].set_xlabel("step")
    figure.align_ylabels(panels)
    figure.tight_layout()
    with atomic_file(out, "wb") as handle:
        figure.savefig(handle, format="png", dpi=130)


def plot_samples(samples: Sequence[Mapping[str, Any]], out: Path, num: int = 8) -> None:
    """Draw how samples of text changed, as a PNG: ``num`` of them, evenly from the first to the last.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "Drawing samples") from error
    num = min(num, len(samples))
    chosen = [samples[i * (len(samples) - 1) // max(1, num - 1)] for i in range(num)]
    plain = ["".join(c if c.isprintable() else "." for c in " ".join(str(one["text"]).split())) for one in chosen]
    texts = [textwrap.fill(text, 108, max_lines=4, placeholder=" ...") for text in plain]
    heights = [0.8 + text.count("\n") + 1 for text in texts]
    figure = Figure(figsize=(9.6, 0.16 * sum(heights) + 0.2))
    top = 1.0
    for one, text, height in zip(chosen, texts, heights, strict=True):
        place: dict[str, Any] = {"va": "top", "fontsize": 8.5, "family": "monospace", "parse_math": False}
        figure.text(0.015, top - 0.02, f"step {one['step']:,}", color="#1f5c54", weight="bold", **place)
        figure.text(0.14, top - 0.02, text, **place)
        top -= height / sum(heights)
    with atomic_file(out, "wb") as handle:
        figure.savefig(handle, format="png", dpi=130)
