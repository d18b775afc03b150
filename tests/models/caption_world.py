"""A small world of images and captions: a square of one colour on a ground of another, and the two words for them."""

from itertools import permutations

import torch
from torch import Tensor, nn

COLOURS = ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0), (1.0, 1.0, -1.0))
SCENES = list(permutations(range(4), 2))  # square, ground: 12 scenes
END = 9


def draw_images(scenes: list[tuple[int, int]], generator: torch.Generator) -> Tensor:
    """Return one noisy image (3, 16, 16) a scene, the square anywhere: (B, 3, 16, 16)."""
    images = 0.3 * torch.randn(len(scenes), 3, 16, 16, generator=generator)
    for image, (square, ground) in zip(images, scenes, strict=True):
        top, left = torch.randint(0, 8, (2,), generator=generator).tolist()
        image += torch.tensor(COLOURS[ground])[:, None, None]
        image[:, top : top + 8, left : left + 8] += (
            torch.tensor(COLOURS[square])[:, None, None] - torch.tensor(COLOURS[ground])[:, None, None]
        )
    return images


def write_captions(scenes: list[tuple[int, int]]) -> Tensor:
    """Return the captions' ids (B, 4): begin, square, ground, end."""
    return torch.tensor([[1, 2 + square, 2 + ground, END] for square, ground in scenes])


def train_on_captions(model: nn.Module, loss_of, *, num_steps: int, is_shuffled: bool) -> tuple[float, float]:
    """Train; return the last losses' mean and the share of new images whose own caption scores highest."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(num_steps):
        order = torch.randperm(12, generator=generator).tolist() if is_shuffled else range(12)
        captions = write_captions([SCENES[i] for i in order])
        loss = loss_of(model(captions, draw_images(SCENES, generator)).logits_per_image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hasattr(model, "clamp_scale"):
            model.clamp_scale()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        scores = model(write_captions(SCENES), draw_images(SCENES * 4, generator)).logits_per_image  # (48, 12)
    right = scores.argmax(-1) == torch.arange(12).repeat(4)
    return sum(losses[-10:]) / 10, float(right.float().mean())
