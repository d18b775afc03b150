"""LLaVA: images find their places, and only theirs. Parity with the reference is in test_parity.py."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelwright.base.errors import ConfigError, RequestError
from modelwright.models.llama import LlamaConfig
from modelwright.models.llava import Llava, LlavaConfig
from modelwright.models.towers import VisionConfig
from modelwright.models.weights import load_model, save_model
from modelwright.nn.attention import record_attention
from modelwright.nn.init import init_weights

IMAGE = 29
VISION = VisionConfig(
    "clip_vision_model", 24, 32, num_layers=3, num_heads=2, image_size=16, patch_size=8, act="quick_gelu", norm_eps=1e-5
)
TEXT = LlamaConfig(30, 32, 48, num_layers=2, num_heads=2, max_seq_len=64)
SMALL = LlavaConfig(TEXT, VISION, image_token_id=IMAGE)
PLACES = [IMAGE] * 4


def random_model(config=SMALL):
    model = init_weights(Llava(config), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def images(batch: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_images_of_a_batch_stand_where_they_would_stand_alone():
    """One row with two images, one without any, one with one: the order of the images is that of their places."""
    model = random_model()
    pictures = images(3)
    first = [1, *PLACES, 5, *PLACES, 6]
    rows = [first, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [1, 2, 3, 4, 5, *PLACES, 6, 7]]
    logits = model(ids(*rows), pictures).logits
    assert torch.allclose(logits[:1], model(ids(first), pictures[:2]).logits, atol=1e-5)
    assert torch.allclose(logits[1:2], model(ids(rows[1])).logits, atol=1e-5)
    assert torch.allclose(logits[2:], model(ids(rows[2]), pictures[2:]).logits, atol=1e-5)
    swapped = model(ids(first), pictures[[1, 0]]).logits  # control: the images' order matters
    assert (logits[:1] - swapped).abs().max() > 1e-3


def test_permuting_rows_and_their_images_permutes_the_outputs():
    model = random_model()
    text, pictures = ids([1, *PLACES, 5, 6], [1, 2, *PLACES, 3]), images(2)
    logits = model(text, pictures).logits
    assert torch.allclose(model(text.flip(0), pictures.flip(0)).logits, logits.flip(0), atol=1e-5)


def test_every_patch_of_an_image_is_seen_and_its_class_token_is_not():
    model = random_model()
    x = model.vision.features(images(1), -2)
    assert torch.allclose(model.embed_images(images(1)), model.projector(x[:, 1:]))
    assert SMALL.num_image_tokens == 4
    assert replace(SMALL, is_class_token_kept=True).num_image_tokens == 5


def test_the_features_are_those_before_the_last_block():
    model = random_model()
    before = model.embed_images(images(1))
    with torch.no_grad():
        for p in model.vision.layers[-1].parameters():
            p.add_(1.0)
    assert torch.equal(model.embed_images(images(1)), before)
    with torch.no_grad():
        model.vision.layers[-2].mlp.down.bias.add_(torch.linspace(-1, 1, 24))
    assert (model.embed_images(images(1)) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("row", "count", "message"),
    [
        ([1, *PLACES[:3], 5], 1, "3 image tokens (id 29), and 1 images give 4 vectors (4 each)"),
        ([1, *PLACES, 5], 2, "4 image tokens (id 29), and 2 images give 8 vectors"),
        ([1, *PLACES, 5], 0, "4 image tokens (id 29), and 0 images give 0 vectors"),
        ([1, 2, 5], 1, "0 image tokens (id 29), and 1 images give 4 vectors"),
    ],
)
def test_another_number_of_places_than_vectors_is_refused_naming_both(row, count, message):
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        random_model()(ids(row), images(count) if count else None)
    assert "max_length" in str(caught.value)


def test_step_by_step_the_image_is_read_once_and_remembered():
    model = random_model()
    row, pictures = ids([1, *PLACES, 5, 6, 7, 8]), images(1)
    state = model.new_state(1)
    pieces = [model(row[:, :6], pictures, positions=state.positions(6), state=state).logits]
    for i in range(6, 9):
        pieces.append(model(row[:, i : i + 1], positions=state.positions(1), state=state).logits)
    assert torch.allclose(torch.cat(pieces, dim=1), model(row, pictures).logits, atol=1e-5)


def test_padding_changes_nothing_at_tokens():
    model = random_model()
    short = [1, *PLACES, 5, 6]
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
    padded = model(ids([0, 0, 0, *short]), images(1), attention_mask=mask, positions=None)
    right = model(ids([*short, 0, 0, 0]), images(1), attention_mask=mask.flip(1))
    assert torch.allclose(right.logits[:, :7], model(ids(short), images(1)).logits, atol=1e-5)
    assert torch.isfinite(padded.logits).all()


def test_maps_of_the_used_tower_blocks_and_of_the_language_model_are_recorded():
    with record_attention() as maps:
        random_model()(ids([1, *PLACES, 5]), images(1))
    assert [tuple(m.shape) for m in maps] == [(1, 2, 5, 5)] * 2 + [(1, 2, 6, 6)] * 2


@pytest.mark.parametrize("is_tied", [False, True])
def test_files_of_several_ages_are_read_and_the_first_form_is_written(is_tied, tmp_path):
    model = random_model(replace(SMALL, text=replace(TEXT, tie_embeddings=is_tied)))
    given = (ids([1, *PLACES, 5]), images(1))
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(*given).logits, model(*given).logits)
    file = tmp_path / "model.safetensors"
    first = load_file(file)
    assert {name.split(".")[0] for name in first} == {"language_model", "vision_tower", "multi_modal_projector"}
    for rename in (
        lambda name: name.replace("vision_tower.vision_model.", "vision_tower."),
        lambda name: "model." + name.replace("language_model.model.", "language_model."),
    ):
        renamed = {rename(name).replace("model.language_model.lm_head", "lm_head"): x for name, x in first.items()}
        save_file(renamed, file)
        again = load_model(tmp_path)
        assert again.config == model.config
        assert torch.equal(again(*given).logits, model(*given).logits)


@pytest.mark.peer
def test_a_config_that_leaves_out_what_is_usual_is_read_as_transformers_reads_it():
    """The published 1.5 names little more than the vocabulary of its text part."""
    transformers = pytest.importorskip("transformers")
    values = {
        "model_type": "llava",
        "image_token_index": 32000,
        "text_config": {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 960, "projection_dim": 768},
    }
    for left_out in ((), ("vision_config",)):
        given = {name: value for name, value in values.items() if name not in left_out}
        theirs, mine = transformers.LlavaConfig.from_dict(dict(given)), LlavaConfig.from_hf(given)
        text, vision = mine.to_hf()["text_config"], mine.to_hf()["vision_config"]
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            assert text[name] == getattr(theirs.text_config, name)
        assert {n: getattr(theirs.vision_config, n) for n in vision} == vision


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "odd"}, "odd"),
        ({"vision_config": {"model_type": "pixtral"}}, "pixtral"),
        ({"text_config": {"model_type": "gemma"}}, "gemma"),
        ({"projector_hidden_act": "odd"}, "odd"),
        ({"image_token_index": 32000}, "one of the 32000 ids"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        LlavaConfig.from_hf({"text_config": {"model_type": "llama", "vocab_size": 32000}} | values)


def learn_colours(is_blind: bool) -> float:
    """Train to say the colour of an image, 60 steps; return how often the answer is right on new images."""
    generator = torch.Generator().manual_seed(1)
    model = init_weights(Llava(SMALL), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def batch(size: int, is_blind: bool) -> tuple[torch.Tensor, torch.Tensor]:
        colour = torch.randint(0, 3, (size,), generator=generator)
        pictures = 0.3 * torch.randn(size, 3, 16, 16, generator=generator)
        pictures[torch.arange(size), colour] += 1.0
        return pictures[torch.randperm(size, generator=generator)] if is_blind else pictures, colour + 10

    text = torch.tensor([[1, *PLACES, 5]])
    for _ in range(60):
        pictures, answer = batch(16, is_blind)
        loss = torch.nn.functional.cross_entropy(model(text.expand(16, -1), pictures).logits[:, -1], answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pictures, answer = batch(60, is_blind=False)
    with torch.no_grad():
        return float((model(text.expand(60, -1), pictures).logits[:, -1].argmax(-1) == answer).float().mean())


def test_it_learns_to_say_what_it_sees_and_not_from_other_rows_images():
    assert learn_colours(is_blind=False) > 0.9
    assert learn_colours(is_blind=True) < 0.6
