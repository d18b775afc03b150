"""SigLIP: the pooling head, the last token, the loss, files. Parity is in test_parity.py."""

import math
from dataclasses import replace

import pytest
import torch
from tests.models.caption_world import train_on_captions

from modelwright.base.errors import ConfigError, RequestError
from modelwright.models.siglip import Siglip, SiglipConfig, SiglipText, SiglipVision, sigmoid_loss
from modelwright.models.towers import TextConfig, VisionConfig
from modelwright.models.weights import load_model, save_model
from modelwright.nn.attention import record_attention
from modelwright.nn.init import init_weights

SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_layers": 2, "num_heads": 2, "norm_eps": 1e-6}
ACT = "gelu_pytorch_tanh"
TEXT = TextConfig("siglip_text_model", vocab_size=30, max_seq_len=12, act=ACT, **SIZES)
VISION = VisionConfig("siglip_vision_model", **SIZES, image_size=16, patch_size=4, act=ACT)
SMALL = SiglipConfig(TEXT, VISION)


def random_model(cls=Siglip, config=SMALL):
    model = init_weights(cls(config), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_the_text_is_read_both_ways_and_its_last_token_counts_even_if_it_is_padding():
    model = random_model(SiglipText, TEXT)
    ids = torch.tensor([[5, 6, 7, 1]])
    assert torch.equal(model(ids).pooled, model.head(model(ids).last_hidden_state[:, -1]))
    other = torch.tensor([[5, 6, 7, 8]])
    first = model(ids).last_hidden_state[:, 0] - model(other).last_hidden_state[:, 0]
    assert first.abs().max() > 1e-3


def test_maps_of_towers_and_of_the_pooling_query_are_recorded():
    with record_attention() as maps:
        random_model()(torch.tensor([[5, 6, 7]]), images(1))
    assert [tuple(m.shape) for m in maps] == [(1, 2, 16, 16)] * 2 + [(1, 2, 1, 16)] + [(1, 2, 3, 3)] * 2


def test_scores_are_products_times_a_scale_plus_a_bias():
    model = random_model()
    out = model(torch.tensor([[5, 6], [7, 8], [9, 10]]), images())
    products = out.image_embeds @ out.text_embeds.T
    wanted = products * math.exp(model.logit_scale.item()) + model.logit_bias.item()
    assert torch.allclose(out.logits_per_image, wanted, atol=1e-5)
    fresh = init_weights(Siglip(SMALL), seed=0)
    assert (fresh.logit_scale.exp().item(), fresh.logit_bias.item()) == pytest.approx((10.0, -10.0), abs=1e-4)


@pytest.mark.peer
def test_the_loss_equals_the_published_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model()
    save_model(model, tmp_path)
    theirs = transformers.SiglipModel.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 1]])
    wanted = theirs(input_ids=ids, pixel_values=images(), return_loss=True).loss
    assert torch.allclose(sigmoid_loss(model(ids, images()).logits_per_image), wanted, atol=1e-5)
    with pytest.raises(RequestError, match=r"\(2, 3\)"):
        sigmoid_loss(torch.zeros(2, 3))


@pytest.mark.parametrize("cls", [Siglip, SiglipText, SiglipVision])
def test_saved_and_loaded_it_is_the_same(cls, tmp_path):
    config = {Siglip: SMALL, SiglipText: replace(TEXT, projection_size=10), SiglipVision: VISION}[cls]
    model = random_model(cls, config)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert type(again) is cls and again.config == model.config
    ids = torch.tensor([[5, 6, 7], [8, 9, 1]])
    given = {Siglip: (ids, images()), SiglipText: (ids,), SiglipVision: (images(),)}[cls]
    assert torch.equal(again(*given)[0], model(*given)[0])


def test_a_tower_without_a_head_gives_states_alone(tmp_path):
    model = random_model(SiglipVision, replace(VISION, has_head=False))
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again(images()).pooled is None and again.config.has_head is False


def test_vectors_of_different_sizes_are_refused():
    with pytest.raises(ConfigError, match="has 10 numbers and an image's 24"):
        SiglipConfig(replace(TEXT, projection_size=10), VISION)
    with pytest.raises(ConfigError, match="needs a head"):
        SiglipConfig(TEXT, replace(VISION, has_head=False))


def test_it_learns_which_caption_belongs_to_an_image_and_not_from_shuffled_ones():
    _, accuracy = train_on_captions(init_weights(Siglip(SMALL), seed=0), sigmoid_loss, num_steps=200, is_shuffled=False)
    loss, control = train_on_captions(
        init_weights(Siglip(SMALL), seed=0), sigmoid_loss, num_steps=200, is_shuffled=True
    )
    # Knowing only that 1 pair of 12 is true costs 12 times the entropy of 1/12.
    blind = -12 * (1 / 12 * math.log(1 / 12) + 11 / 12 * math.log(11 / 12))
    assert accuracy > 0.8
    assert control < 0.3 and loss > 0.9 * blind
