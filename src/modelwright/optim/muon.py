"""Muon: momentum whose matrix updates are made orthogonal, with AdamW for everything that is no matrix.

A gradient step along one strong direction teaches a matrix little; Muon replaces the momentum matrix M = U S V' by
(about) U V', so that all directions move alike. The polar factor is found by a Newton-Schulz iteration, which is
matrix products only and stable in bfloat16.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ (momentum, quintic iteration); Liu et al. 2025,
arXiv:2502.16982, section 2.2 (update scale 0.2 sqrt(max(rows, columns)), so that AdamW's rate and decay carry over);
Amsel et al. 2025, arXiv:2505.16932 (Polar Express: the best polynomial for each iteration).
Of matrices that lie in parts on several ranks the momentum stays in parts; each rank gathers and iterates over all.
Not done here: dividing the iteration among the ranks.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from modelwright.base.errors import ConfigError
from modelwright.optim.bounds import check_betas, check_rates
from modelwright.optim.parts import local_part

# Polar Express coefficients (a, b, c) of the first five iterations, lower bound 1e-3 on the smallest singular value.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
# Rounding to bfloat16 can lift a singular value above 1, where the polynomials grow without bound; each is therefore
# stretched a little, as the paper advises (section 4.4).
_SAFETY = 1.01


def orthogonalize(matrices: Tensor, num_iterations: int = 5) -> Tensor:
    """Return the nearly orthogonal factor of each matrix.

    Args:
        matrices: (batch, rows, columns), any float type.
        num_iterations: Between 1 and 5. The singular values of a Gaussian 704 x 256 matrix end in [0.18, 1.87] after
            three (median 0.8) and in [0.86, 1.13] after five (median 1.01).

    Returns:
        Same shape, computed in bfloat16.
    """
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).to(x.dtype) * _SAFETY + 1e-7)
    for plain_a, plain_b, plain_c in _POLAR_EXPRESS[:num_iterations]:
        a, b, c = plain_a / _SAFETY, plain_b / _SAFETY**3, plain_c / _SAFETY**5
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


@dataclass(frozen=True)
class MuonConfig:
    """Muon for the hidden matrices, AdamW for embeddings, norms and the output layer."""

    learning_rate: float = 0.01  # of the matrices, before the schedule; an update has root mean square 0.2 times this
    momentum: float = 0.95
    weight_decay: float = 0.1  # decoupled, times the learning rate
    num_iterations: int = 3  # of Newton-Schulz, 1 to 5; three cost 60 % of five, which shows in runs of minutes
    adamw_learning_rate: float = 0.003  # of everything that is no hidden matrix
    adamw_betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        check_rates("muon", self.learning_rate, self.weight_decay)
        check_rates("muon (adamw)", self.adamw_learning_rate, 0.0)
        check_betas("muon (adamw)", self.adamw_betas)
        if not 0 <= self.momentum < 1 or not 1 <= self.num_iterations <= len(_POLAR_EXPRESS):
            raise ConfigError(
                f"optimizer.muon has momentum {self.momentum} and num_iterations {self.num_iterations}; the momentum "
                f"must be from 0 to below 1, the iterations from 1 to {len(_POLAR_EXPRESS)}."
            )


class Muon(torch.optim.Optimizer):
    """Muon over a list of matrices; matrices of one shape are orthogonalised in one batched product."""

    def __init__(
        self,
        matrices: Iterable[Tensor],
        learning_rate: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        num_iterations: int = 5,
    ):
        matrices = list(matrices)
        for matrix in matrices:
            if matrix.ndim != 2:
                raise ValueError(
                    f"Muon takes matrices; got a parameter of shape {tuple(matrix.shape)}. Use AdamW for it."
                )
        defaults = {"momentum": momentum, "weight_decay": weight_decay, "num_iterations": num_iterations}
        super().__init__(matrices, {"lr": learning_rate, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply one update to every matrix that has a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            by_shape: dict[Any, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape, getattr(matrix, "device_mesh", None)].append(matrix)
            for matrices in by_shape.values():
                self._update(matrices, group)

    def _update(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [m.grad for m in matrices if m.grad is not None]
        momenta = []
        for matrix in matrices:
            state = self.state[matrix]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(matrix, dtype=torch.float32)
            momenta.append(state["momentum"])
        weight = 1 - group["momentum"]
        torch._foreach_lerp_(momenta, gradients, weight)
        looked_ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov
        whole = [update.full_tensor() if isinstance(update, DTensor) else update for update in looked_ahead]
        updates = orthogonalize(torch.stack(whole), group["num_iterations"])
        rows, columns = matrices[0].shape
        scale = 0.2 * math.sqrt(max(rows, columns))
        if group["weight_decay"]:
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        parts = [_part_like(m, u) for m, u in zip(matrices, updates.to(matrices[0].dtype).unbind(), strict=True)]
        torch._foreach_add_([local_part(m) for m in matrices], parts, alpha=-group["lr"] * scale)


def _part_like(matrix: Tensor, whole: Tensor) -> Tensor:
    """Cut a whole update as its matrix is cut."""
    if not isinstance(matrix, DTensor):
        return whole
    shape, start = compute_local_shape_and_global_offset(matrix.shape, matrix.device_mesh, matrix.placements)
    return whole[tuple(slice(at, at + size) for at, size in zip(start, shape, strict=True))]
