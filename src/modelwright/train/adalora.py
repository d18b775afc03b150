"""The steps of AdaLoRA: note how much each weight matters, let the budget of ranks fall, keep the factors orthogonal.

An objective around any other: the mean loss of a step gets the penalty, and after each update the importance is
smoothed and, when it is due, ranks are given anew. What it remembers are buffers of the layers, so a checkpoint has it.

Source: Zhang et al. 2023, arXiv:2303.10512, algorithm 1.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.nn.adalora import AdaLoraConfig, AdaLoraLinear, allocate
from modelwright.train.objective import Objective

if TYPE_CHECKING:
    from modelwright.train.loop import Run


class BudgetedRanks(Objective):
    """Another objective, with the budget of AdaLoRA."""

    def __init__(self, inner: Objective, config: AdaLoraConfig):
        self.inner, self.config = inner, config
        self._watched: Any = None

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the inner loss and the penalty, as often as there are trained tokens: so it counts in the mean."""
        layers = _layers(model)
        penalty = sum((layer.penalty() for layer in layers[1:]), layers[0].penalty()) / len(layers)
        return self.inner.loss(model, batch) + self.config.orthogonality * penalty * self.inner.count_trained(batch)

    def count_trained(self, batch: Any) -> int:
        """Return what the inner objective counts."""
        return self.inner.count_trained(batch)

    def step(self, run: "Run", batches: Sequence[Any]) -> tuple[float, int, float]:
        """Do one update, and give the ranks anew when it is due."""
        if self._watched is not run:
            self._watched = run
            rule = next(iter(run.optimizer.optimizers.values()))
            rule.register_step_post_hook(lambda *_: self._after(run))
        return super().step(run, batches)

    def _after(self, run: "Run") -> None:
        """Gradients are still there: the loop forgets them after the update."""
        layers, step = _layers(run.model), run.step + 1
        for layer in layers:
            layer.note_importance(self.config.betas)
        first = self.config.warmup_fraction * run.num_steps
        last = (1 - self.config.final_fraction) * run.num_steps
        if first < step <= last and (step % self.config.every == 0 or step + 1 > last):
            allocate(layers, self.config.budget(step + 1 if step + 1 > last else step, run.num_steps))
        for layer in layers:
            layer.silence()


def with_budget(model: nn.Module, objective: Objective) -> Objective:
    """Return the objective with the budget of ranks that AdaLoRA was attached with; without AdaLoRA as it is."""
    config = getattr(model, "adalora", None)
    if config is None or not any(isinstance(module, AdaLoraLinear) for module in model.modules()):
        return objective
    return BudgetedRanks(objective, config)


def _layers(model: nn.Module) -> list[AdaLoraLinear]:
    layers = [module for module in model.modules() if isinstance(module, AdaLoraLinear)]
    if not layers:
        raise ConfigError("BudgetedRanks was given a model without AdaLoRA. Attach AdaLoraConfig first.")
    return layers
