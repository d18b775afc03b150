"""The pre-norm block with LayerNorm and biases, of the towers that see and read (ViT, CLIP, SigLIP).

Source: Dosovitskiy et al. 2020, arXiv 2010.11929, equations 2 and 3; Radford et al. 2019 (norm before, not after).
"""

from torch import Tensor, nn

from modelwright.nn.attention import Attention
from modelwright.nn.init import mark_residual_output
from modelwright.nn.mlp import Mlp


class PreNormBlock(nn.Module):
    """Attention and a two-layer feed-forward, each behind a LayerNorm and added to the stream."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        act: str,
        norm_eps: float,
        place: tuple[int, int],
        bias: bool = True,
    ):
        """Make a block; ``place`` is (index of the layer, number of layers), ``bias`` that of q, k and v."""
        super().__init__()
        layer_index, num_layers = place
        self.attention_norm = nn.LayerNorm(hidden_size, norm_eps)
        self.attention = Attention(
            hidden_size,
            num_heads,
            num_heads,
            hidden_size // num_heads,
            layer_index=layer_index,
            bias=bias,
            output_bias=True,
        )
        self.mlp_norm = nn.LayerNorm(hidden_size, norm_eps)
        self.mlp = Mlp(hidden_size, intermediate_size, act=act)
        mark_residual_output(self.attention.o, num_layers)
        mark_residual_output(self.mlp.down, num_layers)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D)."""
        x = x + self.attention(self.attention_norm(x), mask=mask, is_causal=is_causal)
        return x + self.mlp(self.mlp_norm(x))
