"""What every decoder with a mixture of experts has in common: its output tells where tokens went and what that costs.

Source: see `modelwright.nn.moe`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modelwright.models.decoder import Decoder
from modelwright.nn.init import mark_residual_output
from modelwright.nn.mlp import GatedMlp
from modelwright.nn.moe import MoeOptions, Routing, SparseMoe, auxiliary_losses, record_routing


class MoeOutput(NamedTuple):
    """What a language model with experts returns."""

    logits: Tensor  # (B, T, V), or (B, 1, V) for last_only, in the dtype of the weights
    routings: tuple[Routing, ...]  # of each layer that routes, in their order
    auxiliary: Tensor | None  # (B,) what to add to the mean loss of each row; None when not training, or not asked for
    hidden: Tensor | None = None  # (B, T, D) the input of the output matrix, for hidden_only


class MoeDecoder(Decoder):
    """A `Decoder` some of whose layers are mixtures of experts; its config has ``experts``, a `MoeOptions`."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        state: Any = None,
        last_only: bool = False,
        hidden_only: bool = False,
    ) -> MoeOutput:
        """Return the logits as `Decoder.forward` does, where the tokens went, and the loss that keeps it even.

        The loss of each row is the sum over the layers of both auxiliary losses times their coefficients. It leaves
        out what ``attention_mask`` calls padding, and positions that a ``mask`` lets neither see nor be seen by any
        other (a document of a single token is taken for such a one).
        """
        is_token = None if attention_mask is None else attention_mask.bool()
        if self.training and mask is not None and state is None:
            is_used = _is_used(mask).expand(input_ids.shape)
            is_token = is_used if is_token is None else is_token & is_used
        with record_routing(is_token) as routings:
            out = super().forward(
                input_ids,
                attention_mask=attention_mask,
                positions=positions,
                mask=mask,
                state=state,
                last_only=last_only,
                hidden_only=hidden_only,
            )
        auxiliary = self._auxiliary(routings) if self.training else None
        return MoeOutput(out.logits, tuple(routings), auxiliary, out.hidden)

    def _auxiliary(self, routings: list[Routing]) -> Tensor | None:
        o: MoeOptions = self.config.experts
        if not routings or not (o.balance_coefficient or o.z_coefficient):
            return None
        losses = auxiliary_losses(routings)
        return o.balance_coefficient * losses["load_balancing"].sum(0) + o.z_coefficient * losses["router_z"].sum(0)


def _is_used(mask: Tensor) -> Tensor:
    """Tell which positions see another one or are seen by one: (B or 1, T), from (B or 1, 1 or N, T, T)."""
    others = mask.any(1) & ~torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    others = others & torch.ones_like(others).tril()
    return others.any(-1) | others.any(-2)


def training_options_from_hf(values: Mapping[str, Any]) -> dict[str, Any]:
    """Read what a published config says of training a router."""
    return {
        "balance_coefficient": values.get("router_aux_loss_coef", 0.001),
        "z_coefficient": values.get("router_z_loss_coef", 0.0),
        "capacity_factor": values.get("capacity_factor"),
    }


def training_options_to_hf(options: MoeOptions) -> dict[str, Any]:
    """Write what says how a router is trained; z-loss and capacity have no published name in these families."""
    values: dict[str, Any] = {"router_aux_loss_coef": options.balance_coefficient, "output_router_logits": False}
    if options.z_coefficient:
        values["router_z_loss_coef"] = options.z_coefficient
    if options.capacity_factor is not None:
        values["capacity_factor"] = options.capacity_factor
    return values


def make_half(hidden_size: int, intermediate_size: int, options: MoeOptions | None, num_layers: int) -> nn.Module:
    """Return the feed-forward half of a block: a mixture of experts, or one dense half where ``options`` is None."""
    if options is None:
        dense = GatedMlp(hidden_size, intermediate_size)
        mark_residual_output(dense.down, num_layers)
        return dense
    sparse = SparseMoe(hidden_size, options)
    for linear in sparse.output_layers():
        mark_residual_output(linear, num_layers)
    return sparse
