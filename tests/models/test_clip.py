"""CLIP: where a text's vector is taken, the scale, the loss, files of several ages. Parity is in test_parity.py."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.caption_world import END, train_on_captions

from modelwright.base.errors import ConfigError, RequestError
from modelwright.models.clip import Clip, ClipConfig, ClipText, ClipVision, contrastive_loss
from modelwright.models.towers import TextConfig, VisionConfig
from modelwright.models.weights import load_model, save_model
from modelwright.nn.attention import record_attention
from modelwright.nn.init import init_weights

SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_layers": 2, "num_heads": 2}
TEXT = TextConfig(vocab_size=30, max_seq_len=12, eos_token_id=END, **SIZES)
VISION = VisionConfig("clip_vision_model", **SIZES, image_size=16, patch_size=4, act="quick_gelu", norm_eps=1e-5)
SMALL = ClipConfig(TEXT, VISION, projection_size=20)


def random_model(cls=Clip, config=SMALL):
    model = init_weights(cls(config), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def images(batch: int = 2, size: int = 16) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def texts(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_a_text_ends_at_its_first_end_token_though_padding_is_the_same_one():
    model = random_model(ClipText, TEXT)
    short = texts([1, 5, 6, END])
    padded = texts([1, 5, 6, END, END, END])
    assert torch.allclose(model(short).pooled, model(padded).pooled, atol=1e-5)
    assert torch.allclose(model(padded).pooled, model(padded).last_hidden_state[:, 3])


def test_the_first_configs_take_the_highest_id_as_the_end():
    model = random_model(ClipText, replace(TEXT, eos_token_id=2))
    ids = texts([1, 5, 29, 2, 7])
    assert torch.equal(model(ids).pooled, model(ids).last_hidden_state[:, 2])


def test_a_text_without_an_end_is_refused():
    with pytest.raises(RequestError, match=r"no end token \(9\)"):
        random_model()(texts([1, END, 0], [1, 2, 3]), images())
    with pytest.raises(RequestError, match="at most 12"):
        random_model().embed_texts(torch.full((1, 13), END))


def test_vectors_have_length_one_and_scores_are_their_products_times_the_scale():
    model = random_model()
    out = model(texts([1, 5, END], [1, 6, END], [1, 7, END]), images())
    assert out.logits_per_image.shape == (2, 3) and torch.equal(out.logits_per_text, out.logits_per_image.T)
    assert torch.allclose(out.image_embeds.norm(dim=-1), torch.ones(2))
    assert torch.allclose(out.text_embeds.norm(dim=-1), torch.ones(3))
    scaled = out.image_embeds @ out.text_embeds.T * math.exp(model.logit_scale.item())
    assert torch.allclose(out.logits_per_image, scaled, atol=1e-5)
    assert torch.equal(model.embed_images(images()), out.image_embeds)


def test_maps_of_both_towers_are_recorded_and_the_text_looks_back_only():
    with record_attention() as maps:
        random_model()(texts([1, 5, 6, END]), images(1))
    assert [tuple(m.shape) for m in maps] == [(1, 2, 17, 17)] * 2 + [(1, 2, 4, 4)] * 2
    assert (maps[0] > 0).all() and (maps[2].triu(1) == 0).all()


def test_the_scale_starts_as_published_is_not_decayed_and_stays_below_100():
    model = init_weights(Clip(SMALL), seed=0)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert model.logit_scale.ndim == 0  # optimizers decay matrices only
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    model.clamp_scale()
    assert model.logit_scale.exp().item() == pytest.approx(100.0)


@pytest.mark.peer
def test_the_loss_equals_the_published_one():
    modeling = pytest.importorskip("transformers.models.clip.modeling_clip")
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(contrastive_loss(logits), modeling.image_text_contrastive_loss(logits.T))
    assert contrastive_loss(torch.zeros(64, 64)).item() == pytest.approx(math.log(64))
    with pytest.raises(RequestError, match=r"\(2, 3\)"):
        contrastive_loss(torch.zeros(2, 3))


@pytest.mark.peer
@pytest.mark.parametrize("cls", ["CLIPTextModel", "CLIPVisionModel"])
def test_a_tower_alone_is_read_with_and_without_its_prefix(cls, tmp_path):
    transformers = pytest.importorskip("transformers")
    is_text = "Text" in cls
    model = random_model(ClipText, TEXT) if is_text else random_model(ClipVision, VISION)
    given = texts([1, 5, 6, END]) if is_text else images()
    save_model(model, tmp_path)
    theirs = getattr(transformers, cls).from_pretrained(tmp_path).eval()
    assert (theirs(given).last_hidden_state - model(given).last_hidden_state).abs().max() < 1e-4
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert all(name.startswith(("text_model.", "vision_model.")) for name in tensors)
    bare = {name.split(".", 1)[1]: x for name, x in tensors.items()}
    save_file(bare | {"embeddings.position_ids": torch.arange(12)[None]}, file)
    assert torch.equal(load_model(tmp_path)(given).pooled, model(given).pooled)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = random_model()
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    ids = texts([1, 5, END], [1, 6, END])
    assert again.config == model.config
    assert torch.equal(again(ids, images()).logits_per_image, model(ids, images()).logits_per_image)


@pytest.mark.peer
def test_old_configs_with_two_spellings_of_a_part_are_read_as_transformers_reads_them():
    transformers = pytest.importorskip("transformers")
    values = {
        "model_type": "clip",
        "text_config": {"hidden_size": 64, "num_attention_heads": 4, "hidden_act": "gelu"},
        "text_config_dict": {"hidden_size": 128, "num_hidden_layers": 3},
        "vision_config": {"hidden_size": 96, "patch_size": 16},
        "vision_config_dict": None,
        "projection_dim": 40,
    }
    theirs = transformers.CLIPConfig.from_dict(values)
    mine = ClipConfig.from_hf(values)
    text, vision = mine.to_hf()["text_config"], mine.to_hf()["vision_config"]
    assert {n: getattr(theirs.text_config, n) for n in text} == text
    assert {n: getattr(theirs.vision_config, n) for n in vision} == vision


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vision_config": {"model_type": "resnet"}}, "resnet"),
        ({"text_config": "t5"}, "text_config is 't5'"),
        ({"text_config": {"hidden_act": "odd"}}, "odd"),
        ({"text_config": {"num_attention_heads": 5}}, "num_heads is 5"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        ClipConfig.from_hf(values)


def test_an_end_of_several_ids_is_refused():
    with pytest.raises(ConfigError, match="one id to pool at"):
        ClipText(replace(TEXT, eos_token_id=None))


def test_other_sizes_of_images_are_taken_when_asked_for():
    model = random_model()
    assert model.embed_images(images(size=24), interpolate_positions=True).shape == (2, 20)
    with pytest.raises(RequestError, match="24 x 24"):
        model.embed_images(images(size=24))


def test_a_layer_that_is_not_there_is_refused_and_the_others_are_counted_from_both_ends():
    tower = random_model(ClipVision, VISION)
    assert torch.equal(tower.features(images(), -1), tower.features(images(), 2))
    assert torch.equal(tower.features(images(), -3), tower.features(images(), 0))
    with pytest.raises(RequestError, match="layer is 3"):
        tower.features(images(), 3)


def test_it_learns_which_caption_belongs_to_an_image_and_not_from_shuffled_ones():
    """Guessing is right for 1 of 12. Shuffled captions leave the loss at ln 12."""
    _, accuracy = train_on_captions(
        init_weights(Clip(SMALL), seed=0), contrastive_loss, num_steps=150, is_shuffled=False
    )
    loss, control = train_on_captions(
        init_weights(Clip(SMALL), seed=0), contrastive_loss, num_steps=150, is_shuffled=True
    )
    assert accuracy > 0.8
    assert control < 0.3 and loss > 0.9 * math.log(12)
