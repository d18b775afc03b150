"""Pictures prepared as the published processors do: the same filter, crop and numbers."""

import json

import numpy as np
import pytest
import torch

from modelwright.base.errors import ConfigError, RequestError
from modelwright.models.pixels import PixelConfig, to_pixel_values

Image = pytest.importorskip("PIL.Image")

PROCESSORS = {
    "vit": ("vit", "ViTImageProcessorPil"),
    "clip": ("clip", "CLIPImageProcessorPil"),
    "siglip": ("siglip", "SiglipImageProcessorPil"),
}


def picture(height: int, width: int, mode: str = "RGB", seed: int = 0):
    """Noise on a slope: fine enough to tell filters apart."""
    noise = np.random.default_rng(seed).integers(0, 100, (height, width, 4))
    slope = np.linspace(0, 155, width)[None, :, None]
    image = Image.fromarray((noise + slope).astype(np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert(mode)


def reference(name: str, **values):
    module = pytest.importorskip(
        f"transformers.models.{PROCESSORS[name][0]}.image_processing_pil_{PROCESSORS[name][0]}"
    )
    return getattr(module, PROCESSORS[name][1])(**values)


@pytest.mark.peer
@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("shape", [(300, 400), (401, 299), (64, 64), (30, 500), (224, 224)])
def test_pixels_equal_those_of_the_published_processor(name, shape, tmp_path):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path)
    config = PixelConfig.load(tmp_path)
    images = [picture(*shape, seed=seed) for seed in range(2)]
    mine = to_pixel_values(images, config)
    wanted = torch.as_tensor(np.stack(theirs(images)["pixel_values"]))
    assert mine.dtype == torch.float32 and mine.shape == wanted.shape
    assert (mine - wanted).abs().max() < 1e-6
    other = PixelConfig.from_hf(json.loads((tmp_path / "preprocessor_config.json").read_text()) | {"resample": 0})
    if shape != (224, 224):  # control: another filter is far off
        assert (to_pixel_values(images, other) - wanted).abs().max() > 0.05


@pytest.mark.peer
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_every_colour_mode_becomes_rgb_and_what_is_transparent_white(mode):
    theirs = reference("clip")
    image = picture(250, 260, mode)
    wanted = torch.as_tensor(np.stack(theirs([image])["pixel_values"]))
    config = PixelConfig.from_hf({"image_processor_type": "CLIPImageProcessor"})
    assert (to_pixel_values([image], config) - wanted).abs().max() < 1e-6


@pytest.mark.peer
def test_a_crop_beyond_the_edge_is_filled_as_the_published_one():
    values = {"size": {"shortest_edge": 31}, "crop_size": {"height": 40, "width": 50}, "do_normalize": False}
    image = picture(31, 47)
    wanted = torch.as_tensor(np.stack(reference("clip", **values)([image])["pixel_values"]))
    config = PixelConfig.from_hf({"image_processor_type": "CLIPImageProcessor"} | values)
    assert torch.equal(to_pixel_values([image], config), wanted)


def test_old_files_give_sizes_as_one_number():
    old_clip = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "do_center_crop": True}
    old_vit = {"feature_extractor_type": "ViTFeatureExtractor", "size": 224}
    assert PixelConfig.from_hf(old_clip).shortest_edge == 224 and PixelConfig.from_hf(old_clip).crop == (224, 224)
    assert PixelConfig.from_hf(old_vit).size == (224, 224) and PixelConfig.from_hf(old_vit).crop is None


def test_paths_arrays_and_pictures_give_the_same(tmp_path):
    image = picture(50, 60)
    image.save(tmp_path / "a.png")
    config = PixelConfig(size=(16, 24))
    values = to_pixel_values([image, tmp_path / "a.png", np.asarray(image)], config)
    assert values.shape == (3, 3, 16, 24)
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


def test_what_is_not_a_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(RequestError, match=r"a\.png is not a readable picture"):
        to_pixel_values([tmp_path / "a.png"], PixelConfig())
    with pytest.raises(RequestError, match=r"ndarray \(5, 5\)"):
        to_pixel_values([np.zeros((5, 5))], PixelConfig())
    with pytest.raises(RequestError, match="2 sizes"):
        to_pixel_values([picture(5, 5), picture(6, 5)], PixelConfig(size=None))
    with pytest.raises(RequestError, match="0 sizes"):
        to_pixel_values([], PixelConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_pad": True}, "do_pad"),
        ({"size": {"longest_edge": 5}}, "longest_edge"),
        ({"resample": 9}, "resample"),
    ],
)
def test_what_is_not_done_is_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        PixelConfig.from_hf(values)
