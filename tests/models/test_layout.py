"""Names of published tensors: numbers that count layers, numbers that are part of a name, and prefixes that vary."""

from typing import ClassVar

import pytest
from torch import nn

from modelwright.models.layout import from_published, is_ignored, to_published, translate

TABLE = {
    "layers.*.norm": "block.*.layer.0.norm",
    "layers.*.mlp_norm": "block.*.layer.2.norm",
    "layers.*.experts.*.up": "block.*.layer.2.experts.*.w1",
    "bias": "block.0.layer.0.bias",
}
BACK = {theirs: ours for ours, theirs in TABLE.items()}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("layers.11.norm", "block.11.layer.0.norm"),
        ("layers.0.mlp_norm", "block.0.layer.2.norm"),
        ("layers.2.experts.7.up", "block.2.layer.2.experts.7.w1"),
        ("bias", "block.0.layer.0.bias"),
    ],
)
def test_a_number_that_is_part_of_a_name_is_kept_and_one_that_counts_is_carried_over(ours, theirs):
    assert translate(ours, TABLE) == theirs
    assert translate(theirs, BACK) == ours


@pytest.mark.parametrize("name", ["block.3.layer.1.norm", "block.1.layer.0.bias", "block.x.layer.0.norm", "norm"])
def test_a_name_that_is_not_in_the_table_is_not_guessed(name):
    assert translate(name, BACK) is None


class Prefixed(nn.Module):
    published_names: ClassVar = {"inner": "tower.model.inner"}
    other_prefixes: ClassVar = {"tower.model.": "tower.model.", "tower.": "tower.model.", "old.": "tower.model."}
    ignored_names: ClassVar = ("tower.model.position_ids",)

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)


def test_a_prefix_that_some_exports_write_is_read_and_ours_is_written():
    model = Prefixed()
    for published in ("tower.model.inner.weight", "tower.inner.weight", "old.inner.weight"):
        assert from_published(model, published) == "inner.weight"
    assert to_published(model, "inner.weight") == "tower.model.inner.weight"
    assert is_ignored(model, "tower.position_ids")
    assert from_published(model, "other.inner.weight") is None
