"""What ``mw train`` shows and keeps of a run: the first batches in colour, figures of every step, samples of text."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from modelwright.base import distributed
from modelwright.base.config import load, read_recipe, to_dict
from modelwright.base.progress import console
from modelwright.cli.train_batches import FirstBatches
from modelwright.models.scoring import context_len
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.train.objective import unwrap
from modelwright.train.speed import Speedometer
from modelwright.train.tracking import Tracker, TrackingConfig

LOG_EVERY = 20  # steps, where no progress bar can be shown
PREFIX = "--tracking."
NUM_SAMPLED = 60


_meters: WeakKeyDictionary[Any, Speedometer] = WeakKeyDictionary()


def tell(run: Any, report: Any) -> None:
    """Print a line now and then, where no progress bar can be shown; a hook."""
    if not console.is_terminal and report.step % LOG_EVERY == 0:
        console.print(f"  step {report.step}/{run.num_steps}  {_meters.setdefault(run, Speedometer(run)).line(report)}")


def read_tracking(recipe: Path, arguments: Sequence[str]) -> tuple[TrackingConfig, list[str]]:
    """Return the recipe's ``tracking`` section with its arguments, and the arguments that are left."""
    own = ["--" + word.removeprefix(PREFIX) for word in arguments if word.startswith(PREFIX)]
    rest = [word for word in arguments if not word.startswith(PREFIX)]
    return load(TrackingConfig, read_recipe(recipe).get("tracking") or {}, own), rest


@contextlib.contextmanager
def tracked(config: Any, settings: TrackingConfig) -> Iterator[list[Any]]:
    """Yield the hooks of a run's first process; close what they write to when the run ends, well or not."""
    if distributed.rank() > 0:
        yield []
        return
    folder = settings.folder or config.out.with_name(config.out.name + "-tracking")
    tokenizer = _tokenizer(config)
    sampler = None
    if settings.samples_every and tokenizer is not None:
        sampler = _Sampler(tokenizer, settings.sample_prompts)
    tracker = Tracker(folder, settings, config.out.name, _flat(to_dict(config)), sampler)
    hooks: list[Any] = [tracker]
    if settings.show_batches and tokenizer is not None:
        hooks.insert(0, FirstBatches(tokenizer, settings.show_batches))
    try:
        yield hooks
    finally:
        tracker.close()


def _tokenizer(config: Any) -> Any:
    for name in ("tokenizer", "base"):
        folder = getattr(config, name, None)
        if folder is not None and (Path(folder) / "tokenizer.json").is_file():
            return load_tokenizer(Path(folder))
    return None


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{path}.{name}" if path else name)
    return found


class _Sampler:
    """Goes on with each prompt, token by token; slow and plain, for a few dozen tokens now and then."""

    def __init__(self, tokenizer: Any, prompts: Sequence[str]):
        self._tokenizer, self._prompts = tokenizer, prompts

    @torch.inference_mode()
    def __call__(self, model: Any) -> list[str]:
        """Return a text for each prompt."""
        bare, device = unwrap(model), next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(0)
        texts = []
        for prompt in self._prompts:
            ids = [self._tokenizer.eos_id, *self._tokenizer.encode(prompt)]
            for _ in range(NUM_SAMPLED):
                window = torch.tensor([ids[-context_len(bare) :]], device=device)
                odds = torch.softmax(bare(window).logits[0, -1].float() / 0.8, -1)
                ids.append(int(torch.multinomial(odds, 1, generator=generator)))
                if ids[-1] == self._tokenizer.eos_id:
                    break
            texts.append(self._tokenizer.decode(ids[1:]))
        return texts
