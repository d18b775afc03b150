"""Pictures in prompts: the half of a vision-language model that the engine keeps beside the half that writes.

The engine runs the language model; a picture is a run of image tokens in the prompt whose vectors come from the tower
and the projector in place of the embedding. Each picture is computed alone, so its vectors do not depend on what else
is seen, and kept for the turns to come.

For the prefix cache each place of a picture has a number of its own, made from a hash of the pixels, in place of the
image token's id: two pictures never share blocks behind the same text, the same picture shares them wherever the
words and places before it are equal, and a block that is found is compared in full as ever.
Not here: pictures of several sizes (tiles), videos.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, RequestError
from modelwright.base.types import Message
from modelwright.models.llava import Llava
from modelwright.models.pixels import PREPROCESSOR, PixelConfig, to_pixel_values
from modelwright.tokenizer.bpe import Tokenizer

MAX_KEPT = 64  # pictures whose vectors are kept; 576 of 4,096 numbers in 16 bits are 4.7 MB
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture as the language model reads it."""

    hash: bytes  # of its pixels
    vectors: Tensor  # (image tokens, D)

    def marks(self) -> list[int]:
        """Return a negative number, which no token has, for each place: 63 bits of a hash of the pixels and place."""
        stream = hashlib.shake_128(self.hash).digest(8 * len(self.vectors))
        return (np.frombuffer(stream, np.int64) | np.int64(-(2**63))).tolist()


class Sight:
    """Turns pictures into what stands for them in a prompt. Safe to use from several threads while the engine steps.

    Args:
        model: The whole model.
        folder: Where its ``preprocessor_config.json`` stands; None: pictures are squared to the tower's size.
        tokenizer: Whose special token stands for a picture; None: prompts are token ids alone.

    Raises:
        ConfigError: The tokenizer has no such token, or the pixels are not what the tower reads.
    """

    def __init__(self, model: Llava, folder: Path | None, tokenizer: Tokenizer | None):
        self._model = model
        self.token_id = model.config.image_token_id
        self.num_tokens = model.config.num_image_tokens
        self.pixels = _pixel_config(model, folder)
        self.image_token = ""
        if tokenizer is not None:
            texts = {index: text for text, index in tokenizer.special_ids.items()}
            if self.token_id not in texts:
                raise ConfigError(
                    f"The model's image_token_id is {self.token_id}, which is no special token of the tokenizer. "
                    "Use the tokenizer that belongs to the model."
                )
            self.image_token = texts[self.token_id]
        self._kept: OrderedDict[bytes, Picture] = OrderedDict()
        self._lock = threading.Lock()

    def see(self, images: Sequence[Any]) -> tuple[Picture, ...]:
        """Return pictures ready for a request.

        Args:
            images: Pillow images, paths, or arrays (H, W, 3) of bytes.

        Raises:
            RequestError: One is no readable picture.
        """
        return tuple(self.see_pixels(to_pixel_values([image], self.pixels)[0]) for image in images)

    @torch.inference_mode()
    def see_pixels(self, pixel_values: Tensor) -> Picture:
        """Return the picture of pixel values (C, H, W)."""
        name = hashlib.blake2b(repr(tuple(pixel_values.shape)).encode(), digest_size=16)
        name.update(pixel_values.float().contiguous().numpy().tobytes())
        key = name.digest()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        weight = self._model.projector.up.weight
        vectors = self._model.embed_images(pixel_values[None].to(weight))[0]  # (P, D)
        made = Picture(key, vectors)
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return made

    def expand(self, token_ids: Sequence[int], num_images: int) -> list[int]:
        """Return ids in which each image token has become as many as a picture has vectors.

        Raises:
            ConfigError: There are not as many image tokens as pictures: the chat template leaves some out.
        """
        found = sum(token == self.token_id for token in token_ids)
        if found != num_images:
            raise ConfigError(
                f"The conversation has {num_images} pictures and the chat template wrote {found} image tokens "
                f"({self.image_token}). Use the template that belongs to the model."
            )
        return [t for token in token_ids for t in ([token] * self.num_tokens if token == self.token_id else [token])]


def split_model(model: nn.Module) -> tuple[nn.Module, Llava | None]:
    """Return the language model that the engine runs, and the whole that sees, if it does."""
    return (model.language, model) if isinstance(model, Llava) else (model, None)


def _pixel_config(model: Llava, folder: Path | None) -> PixelConfig:
    vision = model.config.vision
    side = (vision.image_size, vision.image_size)
    if folder is not None and (folder / PREPROCESSOR).is_file():
        config = PixelConfig.load(folder)
        if (config.crop or config.size) != side:
            raise ConfigError(
                f"{folder / PREPROCESSOR} makes pictures of {config.crop or config.size}; the tower reads {side}. "
                "Use the file that belongs to the model."
            )
        return config
    if vision.family == "clip_vision_model":
        return PixelConfig(size=side, resample=3, mean=CLIP_MEAN, std=CLIP_STD)
    return PixelConfig(size=side, resample=3)


def place_pictures(
    prompt_ids: Sequence[int], pictures: Sequence[Picture], sight: Sight | None
) -> tuple[tuple[int, Picture], ...]:
    """Return where each picture begins in a prompt.

    Raises:
        RequestError: The model does not see, or the image tokens are not those of so many pictures.
    """
    if sight is None:
        if pictures:
            raise RequestError(
                f"The prompt has {len(pictures)} pictures, and this model does not see. Send text alone.",
                param="messages",
                code="unsupported_parameter",
            )
        return ()
    places = [at for at, token in enumerate(prompt_ids) if token == sight.token_id]
    starts = places[:: sight.num_tokens]
    is_right = len(places) == sight.num_tokens * len(pictures) and all(
        places[i * sight.num_tokens + sight.num_tokens - 1] == start + sight.num_tokens - 1
        for i, start in enumerate(starts)
    )
    if not is_right:
        raise RequestError(
            f"The prompt has {len(places)} image tokens (id {sight.token_id}), and {len(pictures)} pictures take "
            f"{sight.num_tokens} each, in a row. Send pictures as parts of a chat message.",
            param="prompt",
            code="invalid_value",
        )
    return tuple(zip(starts, pictures, strict=True))


def read_chat(
    tokenizer: Tokenizer, sight: Sight | None, messages: Sequence[Message], tools: Sequence[Any] = ()
) -> tuple[list[int], tuple[Picture, ...]]:
    """Return the token ids of a conversation that waits for its answer, and its pictures.

    Raises:
        ConfigError: The chat template refuses the conversation.
        RequestError: There are pictures and the model does not see, or one cannot be read.
    """
    images = [image for message in messages for _, image in message.images]
    if sight is None and images:
        place_pictures((), images, None)
    token = sight.image_token if sight is not None else ""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=tools, image_token=token)
    if sight is None or not images:
        return ids, ()
    return sight.expand(ids, len(images)), sight.see(images)
