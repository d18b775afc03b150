"""An image as a sequence: cut into patches, each a vector, with positions that stretch to other sizes.

Source: Dosovitskiy et al. 2020, arXiv 2010.11929, section 3.1 and 3.2 (positions of another resolution are
interpolated in two dimensions; here by the bicubic filter of the published code). B images, C channels, D width.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.base.errors import RequestError
from modelwright.nn.init import STD


class PatchConv(nn.Conv2d):
    """One linear map for every patch, written as a convolution whose steps are as wide as its window."""

    vector_names: ClassVar[tuple[str, ...]] = ("weight",)  # an embedding with four axes, not a hidden matrix

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Draw the weight from a normal distribution of deviation 0.02; the bias is zero."""
        self.weight.copy_(torch.empty(self.weight.shape).normal_(0.0, STD, generator=generator))
        if self.bias is not None:
            self.bias.zero_()


class PatchEmbedding(nn.Module):
    """Patches, a class token before them where a family has one, and learned positions."""

    vector_names: ClassVar[tuple[str, ...]] = ("class_token", "positions")

    def __init__(
        self,
        hidden_size: int,
        *,
        image_size: int,
        patch_size: int,
        num_channels: int = 3,
        bias: bool = True,
        class_shape: tuple[int, ...] | None = None,
        num_leading_axes: int = 0,
    ):
        """Make the layer.

        Args:
            hidden_size: D.
            image_size: Height and width that the positions were learned for.
            patch_size: Height and width of a patch.
            num_channels: C.
            bias: Whether the patches' map has one.
            class_shape: Of the class token as it is published, for instance (D,); None: there is none.
            num_leading_axes: Axes of size 1 before (positions, D) in the published table.
        """
        super().__init__()
        self.image_size, self.patch_size = image_size, patch_size
        self.project = PatchConv(num_channels, hidden_size, patch_size, stride=patch_size, bias=bias)
        self.class_token = None if class_shape is None else nn.Parameter(torch.empty(class_shape))
        num_positions = (image_size // patch_size) ** 2 + (class_shape is not None)
        self.positions = nn.Parameter(torch.empty(*[1] * num_leading_axes, num_positions, hidden_size))

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Draw the class token and the positions from a normal distribution of deviation 0.02."""
        for parameter in (self.class_token, self.positions):
            if parameter is not None:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, STD, generator=generator))

    def forward(self, pixel_values: Tensor, is_stretched: bool = False) -> Tensor:
        """Map images (B, C, H, W) to vectors (B, patches [+ 1], D), the class token first, then row by row.

        Args:
            pixel_values: Images, normalised as the model wants them.
            is_stretched: Take images of other sizes, interpolating the positions.

        Raises:
            RequestError: Another number of channels, or another size and not ``is_stretched``.
        """
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.project.in_channels:
            raise RequestError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (B, {self.project.in_channels}, H, W)."
            )
        height, width = pixel_values.shape[2:]
        if not is_stretched and (height, width) != (self.image_size, self.image_size):
            raise RequestError(
                f"The images are {height} x {width}; this model was made for {self.image_size} x {self.image_size}. "
                "Resize them, or pass interpolate_positions=True."
            )
        x = self.project(pixel_values.to(self.project.weight.dtype)).flatten(2).mT  # (B, patches, D)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(len(x), 1, -1), x), dim=1)
        return x + self._positions(height // self.patch_size, width // self.patch_size)

    def _positions(self, num_rows: int, num_columns: int) -> Tensor:
        table = self.positions.view(-1, self.positions.shape[-1])  # (patches [+ 1], D)
        num_first = int(self.class_token is not None)
        side = self.image_size // self.patch_size
        if (num_rows, num_columns) == (side, side):
            return table
        grid = table[num_first:].view(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
        # bicubic only where the size differs: at the same size the filter would return the table itself
        grid = F.interpolate(grid, size=(num_rows, num_columns), mode="bicubic", align_corners=False)
        return torch.cat((table[:num_first], grid.flatten(2)[0].mT))  # (rows * columns [+ 1], D)
