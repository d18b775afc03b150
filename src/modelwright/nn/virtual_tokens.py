"""Virtual tokens: trained vectors before a text, as embeddings (prompt tuning) or as keys and values (prefix tuning).

Prompt tuning gives the first block N more rows to read. Prefix tuning gives the attention of every layer N keys and
values that are computed from nothing; they are not rotated, as in PEFT. In both, the text's positions begin at N.

Every text in a packed row sees them, whatever its mask: virtual tokens see only each other, so they are the same for
all, and a packed row equals its texts alone.

Source: Lester et al. 2021, arXiv:2104.08691 (prompt); Li & Liang 2021, arXiv:2101.00190 (prefix). Not done: the
reparametrisation by a feed-forward of the prefix (``prefix_projection``), models that are no `Decoder`, windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, RequestError
from modelwright.nn.attention import Attention


@dataclass(frozen=True)
class PromptConfig:
    """Trained embeddings before the text."""

    num_tokens: int = 16
    text_ids: tuple[int, ...] = ()  # token ids whose embeddings are the first values, repeated; (): random tokens'

    def attach(self, model: Any) -> list[str]:
        """Put them in place."""
        _check(model, self.num_tokens)
        if "embed_tokens" in vars(type(model)):
            raise ConfigError(
                f"{type(model).__name__} changes embeddings before its first block, and prompt tuning does not do "
                "that to its vectors. Use prefix or lora."
            )
        table: Tensor = model.embed.weight.detach()
        # On the CPU whatever the default device is: a plan makes models on the meta device.
        drawn = torch.randint(table.shape[0], (self.num_tokens,), device="cpu")
        ids = torch.tensor(self.text_ids, device="cpu") if self.text_ids else drawn
        if int(ids.max()) >= table.shape[0] or int(ids.min()) < 0:
            raise ConfigError(f"prompt.text_ids holds {int(ids.max())}; the model knows 0 to {table.shape[0] - 1}.")
        ids = ids.repeat(-(-self.num_tokens // len(ids)))[: self.num_tokens]
        model.virtual = SoftPrompt(table[ids.to(table.device)].float())
        return ["embed"]


@dataclass(frozen=True)
class PrefixConfig:
    """Trained keys and values before the text, in every layer."""

    num_tokens: int = 16
    std: float = 0.02  # of the first values

    def attach(self, model: Any) -> list[str]:
        """Put them in place."""
        _check(model, self.num_tokens)
        layouts = model.cache_layout()
        if any(c.fixed_size or c.window is not None or c.key_dim != c.value_dim for c in layouts):
            raise ConfigError(
                f"Prefix tuning needs plain attention in every layer; {type(model).__name__} has windows or state. Use "
                "lora or prompt."
            )
        device = model.embed.weight.device
        attentions = [m for m in model.modules() if isinstance(m, Attention)]
        if sorted(a.layer_index for a in attentions) != list(range(len(layouts))):
            raise ConfigError(
                f"Not every layer of {type(model).__name__} attends in the plain way. Use lora or prompt."
            )
        shape = (len(layouts), 2, self.num_tokens, layouts[0].num_kv_heads, layouts[0].key_dim)
        model.virtual = Prefix(torch.empty(shape, device=device).normal_(std=self.std), attentions)
        return ["layers"]


def _check(model: Any, num_tokens: int) -> None:
    if not getattr(model, "reads_virtual_tokens", False):
        raise ConfigError(f"{type(model).__name__} has no place for virtual tokens; it must be a decoder. Use lora.")
    longest = model.config.max_seq_len
    if not 1 <= num_tokens < longest:
        raise ConfigError(
            f"num_tokens is {num_tokens}; expected 1 to {longest - 1}, the context of the model less one."
        )


class VirtualTokens(nn.Module):
    """What both kinds share: their number, positions behind them, and the part of a mask that shows them."""

    num_tokens: int

    def shifted(self, x: Tensor, positions: Tensor | None, longest: int) -> Tensor:
        """Return the positions (B, T) of a text behind the virtual tokens.

        Raises:
            RequestError: Both together are longer than the context.
        """
        if x.shape[1] + self.num_tokens > longest:
            raise RequestError(
                f"The input has {x.shape[1]} tokens behind {self.num_tokens} virtual ones; this model reads at most "
                f"{longest}. Shorten it.",
                code="context_length_exceeded",
            )
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return positions + self.num_tokens


class SoftPrompt(VirtualTokens):
    """Trained embeddings (N, D)."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self.num_tokens = first.shape[0]
        self.embeddings = nn.Parameter(first.clone())

    def prepend(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the stream (B, N + T, D), its positions, and a mask (B, 1, N + T, N + T) that shows them to all."""
        own = self.embeddings.to(x.dtype).expand(x.shape[0], -1, -1)
        before = torch.arange(self.num_tokens, device=x.device).expand(x.shape[0], -1)
        joined = torch.cat((own, x), dim=1), torch.cat((before, positions), dim=1)
        return *joined, None if mask is None else _widen(mask, self.num_tokens, self.num_tokens)


class Prefix(VirtualTokens):
    """Trained keys and values (L, 2, N, K, H)."""

    def __init__(self, first: Tensor, attentions: Sequence[Attention]) -> None:
        super().__init__()
        self.num_tokens = first.shape[2]
        self.keys_values = nn.Parameter(first.clone())
        for attention in attentions:
            attention.extend = self.extend

    @staticmethod
    def detach_from(model: nn.Module) -> None:
        """Let the attention of a model look at its text alone again."""
        for module in model.modules():
            if isinstance(module, Attention):
                module.extend = None

    def extend(
        self, layer_index: int, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values (B, N + T, K, H) of a layer, and the mask (B, 1, T, N + T) of who sees what."""
        own_k, own_v = self.keys_values[layer_index].to(k.dtype).expand(k.shape[0], -1, -1, -1, -1).unbind(1)
        length = k.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=k.device)
        if is_causal:
            seen = seen.tril()
        seen = seen[None, None] if mask is None else mask & seen
        return torch.cat((own_k, k), 1), torch.cat((own_v, v), 1), _widen(seen, self.num_tokens, 0)


def _widen(mask: Tensor, num_columns: int, num_rows: int) -> Tensor:
    """Return a mask (..., T, S) with columns before the first key, and rows before the first query, that allow all."""
    return nn.functional.pad(mask, (num_columns, 0, num_rows, 0), value=True)


@torch.no_grad()
def begin_state(model: Any, state: Any) -> None:
    """Let a fresh decode state remember a model's virtual tokens; the text then follows at its positions."""
    virtual = model.virtual
    if virtual is None:
        return
    batch_size: int = state.batch_size
    device = next(virtual.parameters()).device
    positions = torch.arange(virtual.num_tokens, device=device).expand(batch_size, -1)
    if isinstance(virtual, SoftPrompt):
        ids = torch.zeros(batch_size, virtual.num_tokens, dtype=torch.long, device=device)
        rows = virtual.embeddings.to(model.embed.weight.dtype).expand(batch_size, -1, -1)
        model.hidden(ids, positions, state=state, embedded=rows)
        return
    for index, (keys, values) in enumerate(virtual.keys_values):
        k, v = (t.to(model.embed.weight.dtype).expand(batch_size, *t.shape) for t in (keys, values))
        state.attend(index, k, k, v, 1.0)
    state.advance(virtual.num_tokens)
