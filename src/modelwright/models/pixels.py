"""From pictures to pixel values: resize, crop, scale, normalise, just as a model's published processor does.

The settings stand beside a model in ``preprocessor_config.json``. Resizing is Pillow's, by the filter that the file
names (a number of Pillow's): another library's filter of the same name gives other pixels.
Not here: padding to a square, splitting large images into tiles; a file that asks for these is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelwright.base.errors import ConfigError, MissingExtraError, RequestError
from modelwright.base.files import read_json

PREPROCESSOR = "preprocessor_config.json"
REFUSED = ("do_pad", "do_image_splitting", "do_pan_and_scan", "do_reduce_labels")
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class PixelConfig:
    """What is done to a picture; the defaults are those of ViT."""

    size: tuple[int, int] | None = (224, 224)  # height and width after resizing; None: by shortest_edge, or not at all
    shortest_edge: int | None = None  # the shorter side after resizing, the longer in proportion; None: by size
    resample: int = 2  # Pillow's number of a filter: 2 bilinear, 3 bicubic
    crop: tuple[int, int] | None = None  # height and width cut from the middle, zeros around if too small; None: all
    scale: float | None = 1 / 255  # factor on the bytes; None: as they are
    mean: tuple[float, ...] | None = (0.5, 0.5, 0.5)  # per channel, subtracted; None: neither mean nor std
    std: tuple[float, ...] | None = (0.5, 0.5, 0.5)  # per channel, divided by

    def __post_init__(self) -> None:
        if self.resample not in FILTERS:
            raise ConfigError(f"resample is {self.resample!r}; known: {FILTERS}.")
        if self.size is not None and self.shortest_edge is not None:
            raise ConfigError(f"size is {self.size} and shortest_edge is {self.shortest_edge}; give one of the two.")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "PixelConfig":
        """Read a published ``preprocessor_config.json``.

        Raises:
            ConfigError: A field asks for what this code does not do.
        """
        for name in REFUSED:
            if values.get(name, False):
                raise ConfigError(f"{name} is {values[name]!r}; preparing images here does not do that.")
        kind = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
        is_clip = kind.startswith(("CLIP", "Llava"))  # their file may leave out what is usual for them
        size = values.get("size", {"shortest_edge": 224} if is_clip else {"height": 224, "width": 224})
        is_cropped = values.get("do_center_crop", is_clip)
        if isinstance(size, int):  # old files: the shorter side where a middle is cut, else a square
            size = {"shortest_edge": size} if is_cropped else {"height": size, "width": size}
        is_known = set(size) in ({"shortest_edge"}, {"height", "width"})
        if not is_known:
            raise ConfigError(f"size is {size}; known: shortest_edge alone, or height and width.")
        is_resized = values.get("do_resize", True)
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        is_normalized = values.get("do_normalize", True)
        return cls(
            size=(size["height"], size["width"]) if is_resized and "height" in size else None,
            shortest_edge=size.get("shortest_edge") if is_resized else None,
            resample=int(values.get("resample", 3 if is_clip or kind.startswith("Siglip") else 2)),
            crop=_crop(values.get("crop_size", 224)) if is_cropped else None,
            scale=values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else None,
            mean=tuple(values.get("image_mean", mean if is_clip else cls.mean)) if is_normalized else None,
            std=tuple(values.get("image_std", std if is_clip else cls.std)) if is_normalized else None,
        )

    @classmethod
    def load(cls, directory: str | Path) -> "PixelConfig":
        """Read the file beside a model."""
        return cls.from_hf(read_json(Path(directory) / PREPROCESSOR))


def _crop(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def to_pixel_values(images: Sequence[Any], config: PixelConfig) -> Tensor:
    """Return pixel values (B, C, H, W), float32, of pictures.

    Args:
        images: Each a Pillow image, the path of a file, or an array (H, W, 3) of bytes. What is transparent is
            white.
        config: What to do to them.

    Raises:
        RequestError: Not a picture, or pictures that end up in different sizes.
        MissingExtraError: Pillow is not installed.
    """
    arrays = [_prepare(image, config) for image in images]
    if len({array.shape for array in arrays}) != 1:
        raise RequestError(
            f"The pictures end up in {len({array.shape for array in arrays})} sizes: "
            f"{sorted({array.shape[1:] for array in arrays})}. Give at least one, and a config that makes them equal."
        )
    return torch.from_numpy(np.stack(arrays))


def _prepare(image: Any, config: PixelConfig) -> np.ndarray:
    picture = _open(image)
    if config.shortest_edge is not None:
        picture = picture.resize(_in_proportion(picture.size, config.shortest_edge), resample=config.resample)
    elif config.size is not None:
        picture = picture.resize(config.size[::-1], resample=config.resample)
    if config.crop is not None:
        height, width = config.crop
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        picture = picture.crop((left, top, left + width, top + height))  # beyond the edge there are zeros
    array = np.asarray(picture).astype(np.float64)  # (H, W, 3)
    if config.scale is not None:
        array = array * config.scale
    array = array.astype(np.float32)
    if config.mean is not None and config.std is not None:
        array = (array - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
    return np.ascontiguousarray(array.transpose(2, 0, 1))  # (3, H, W)


def _in_proportion(size: tuple[int, int], shortest_edge: int) -> tuple[int, int]:
    """Return (width, height) with this shorter side; the longer is cut to a whole number, not rounded."""
    width, height = size
    if width <= height:
        return shortest_edge, int(shortest_edge * height / width)
    return int(shortest_edge * width / height), shortest_edge


def _open(image: Any) -> Any:
    """Return a Pillow image in RGB, laid on white where it is transparent."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtraError("pillow", "vision", "Preparing images") from None
    picture: Any
    if isinstance(image, str | Path):
        try:
            picture = Image.open(image)
            picture.load()
        except (UnidentifiedImageError, OSError) as error:
            raise RequestError(f"{image} is not a readable picture: {error}. Give a PNG, JPEG or the like.") from error
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        picture = Image.fromarray(image)
    elif isinstance(image, Image.Image):
        picture = image
    else:
        raise RequestError(
            f"An image is a {type(image).__name__} {getattr(image, 'shape', '')}; expected a Pillow image, a path, or "
            "an array (H, W, 3) of bytes."
        )
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        layered = picture.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, layered)
    return picture.convert("RGB")
