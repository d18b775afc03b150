"""Heads that predict the tokens after the next one, over the hidden states and the output matrix of any decoder.

Head k reads the state after the last norm and changes it: ``h + silu(W_k h)``, W_k zero at first, so that it begins as
the prediction of the next token; the decoder's own output matrix makes logits of it. The heads are a file of their own
beside the model (``multi_token.safetensors``): the model itself stays an ordinary one, and speculation can load them.

Source: Gloeckle et al. 2024, arXiv:2404.19737 (the loss; their heads are whole blocks); Cai et al. 2024,
arXiv:2401.10774, section 2.1 (the heads). Not done: heads one after the other (DeepSeek-V3).
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.models.decoder import Decoder
from modelwright.models.tensor_file import write_tensors

HEADS_FILE = "multi_token.safetensors"


class TokenHead(nn.Module):
    """One head: (..., D) to (..., D)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the state from which the decoder's output matrix makes logits."""
        return hidden + F.silu(self.dense(hidden))


class MultiTokenDecoder(nn.Module):
    """A decoder with ``num_extra`` heads; called like the decoder."""

    def __init__(self, decoder: Decoder, num_extra: int):
        super().__init__()
        if num_extra < 1:
            raise ConfigError(f"num_extra is {num_extra}; it must be at least 1.")
        if not isinstance(decoder, Decoder):
            raise ConfigError(f"{type(decoder).__name__} is no decoder; heads for later tokens stand on one.")
        self.decoder = decoder
        self.config = decoder.config
        self.heads = nn.ModuleList(TokenHead(decoder.config.hidden_size) for _ in range(num_extra))

    @property
    def lm_head(self) -> nn.Linear:
        """The decoder's output matrix."""
        return self.decoder.lm_head

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        """Return what the decoder returns."""
        return self.decoder(input_ids, **inputs)

    @torch.no_grad()
    def guess(self, input_ids: Tensor) -> Tensor:
        """Return the likeliest of the next ``1 + num_extra`` tokens behind each row, (B, 1 + num_extra)."""
        hidden = self.decoder(input_ids, hidden_only=True).hidden[:, -1]  # (B, D)
        states = [hidden, *(head(hidden) for head in self.heads)]
        return torch.stack([self.decoder.lm_head(state).argmax(-1) for state in states], dim=1)


def save_heads(model: MultiTokenDecoder, folder: str | Path) -> None:
    """Write the heads into a model's folder."""
    write_tensors(Path(folder) / HEADS_FILE, {name: t.detach() for name, t in model.heads.state_dict().items()})


def load_heads(decoder: Decoder, folder: str | Path) -> MultiTokenDecoder:
    """Return the decoder with the heads that stand in a folder.

    Raises:
        CheckpointError: There are none, or they belong to another width.
    """
    file = Path(folder) / HEADS_FILE
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: the folder has no heads for later tokens. Train with multi_token.")
    tensors = load_file(file)
    width = decoder.config.hidden_size
    found = {tuple(t.shape) for name, t in tensors.items() if name.endswith("weight")}
    if found != {(width, width)}:
        raise CheckpointError(f"{file} has heads of {sorted(found)}; the model is {width} wide. Take its own heads.")
    model = MultiTokenDecoder(decoder, len(tensors) // 2)
    model.heads.load_state_dict(tensors)
    kept = next(decoder.norm.parameters())  # the output matrix may be packed and have no numbers of its own
    model.heads.to(device=kept.device, dtype=kept.dtype)
    return model
