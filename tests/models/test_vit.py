"""ViT: other sizes of images, heads, files. Parity with the reference is in test_parity.py."""

import pytest
import torch

from modelwright.base.errors import ConfigError, RequestError
from modelwright.models.towers import VisionConfig
from modelwright.models.vit import ViT, ViTClassifier, ViTConfig
from modelwright.models.weights import load_model, save_model
from modelwright.nn.attention import record_attention
from modelwright.nn.init import init_weights

VISION = VisionConfig(hidden_size=24, intermediate_size=32, num_layers=2, num_heads=2, image_size=32, patch_size=8)
SMALL = ViTConfig(VISION, labels=("cat", "dog", "owl"))


def random_model(cls=ViT, config: ViTConfig = SMALL):
    model = init_weights(cls(config), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def images(*size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.peer
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (40, 24), (16, 64), (36, 33)])
def test_positions_stretch_to_other_sizes_as_the_published_ones(size, tmp_path):
    """Also to as many patches in another arrangement (16 x 64), and where a rest of the image is left over."""
    transformers = pytest.importorskip("transformers")
    model = random_model()
    save_model(model, tmp_path)
    theirs = transformers.ViTModel.from_pretrained(tmp_path).eval()
    mine = model(images(*size), interpolate_positions=True)
    wanted = theirs(images(*size), interpolate_pos_encoding=True)
    assert (mine.last_hidden_state - wanted.last_hidden_state).abs().max() < 1e-4
    assert (mine.pooled - wanted.pooler_output).abs().max() < 1e-4


def test_another_size_is_refused_unless_asked_for():
    with pytest.raises(RequestError, match=r"40 x 32; this model was made for 32 x 32"):
        random_model()(images(40, 32))
    with pytest.raises(RequestError, match=r"expected \(B, 3, H, W\)"):
        random_model()(torch.zeros(1, 1, 32, 32))


def test_every_patch_and_the_class_token_are_seen_by_all():
    with record_attention() as maps:
        random_model()(images(32, 32))
    assert [tuple(m.shape) for m in maps] == [(2, 2, 17, 17)] * 2
    assert all((m > 0).all() for m in maps)


@pytest.mark.parametrize("cls", [ViT, ViTClassifier])
def test_saved_and_loaded_it_is_the_same(cls, tmp_path):
    model = random_model(cls)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert type(again) is cls and again.config == model.config
    assert torch.equal(again(images(32, 32))[0], model(images(32, 32))[0])


def test_a_model_without_a_pooler_says_none(tmp_path):
    model = random_model()
    model.pooler = None
    save_model(model, tmp_path)
    assert load_model(tmp_path)(images(32, 32)).pooled is None


def test_labels_come_in_the_order_of_their_numbers():
    named = {str(i): f"label {i}" for i in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)}
    config = ViTConfig.from_hf({"id2label": named})
    assert config.labels == tuple(f"label {i}" for i in range(11))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pooler_act": "relu"}, "pooler_act"),
        ({"image_size": [224, 112]}, "image_size"),
        ({"hidden_act": "swiglu"}, "swiglu"),
        ({"num_attention_heads": 5}, "num_heads is 5"),
        ({"image_size": 8}, "patch_size is 16"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        ViTConfig.from_hf(values)


def learn_colours(is_shuffled: bool) -> float:
    """Train to tell the colour of a bright patch anywhere, 100 steps; return the accuracy on images not seen."""
    generator = torch.Generator().manual_seed(1)
    model = init_weights(ViTClassifier(SMALL), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        colour, place = (torch.randint(0, n, (size,), generator=generator).tolist() for n in (3, 16))
        x = 0.5 * torch.randn(size, 3, 32, 32, generator=generator)
        for image, c, p in zip(x, colour, place, strict=True):
            image[c, 8 * (p // 4) : 8 * (p // 4) + 8, 8 * (p % 4) : 8 * (p % 4) + 8] += 2.0
        return x, torch.tensor(colour)

    for _ in range(100):
        x, colour = batch(32)
        wanted = colour[torch.randperm(32, generator=generator)] if is_shuffled else colour
        loss = torch.nn.functional.cross_entropy(model(x).logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, colour = batch(100)
    with torch.no_grad():
        return float((model(x).logits.argmax(-1) == colour).float().mean())


def test_it_learns_what_is_somewhere_and_not_from_shuffled_labels():
    assert learn_colours(is_shuffled=False) > 0.9
    assert learn_colours(is_shuffled=True) < 0.6
