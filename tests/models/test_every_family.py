"""What holds for every family in the table: weights come back the same, nothing stays unfilled, headers tell the truth.

Configs are those of benchmarks/parity.py, read as published; families that nobody else publishes have theirs below.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelwright.base.errors import ConfigError
from modelwright.base.registry import lookup
from modelwright.models import FAMILIES
from modelwright.models.layout import tied_names
from modelwright.models.summary import summarize
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights

# Architectures that are not in transformers: the fields of a tiny config.
OWN: dict[str, dict[str, Any]] = {
    "FeedForwardForCausalLM": {"vocab_size": 31},
    "RecurrentForCausalLM": {"vocab_size": 31, "hidden_size": 16},
    "RecurrentForSequenceClassification": {"vocab_size": 31, "hidden_size": 16, "num_labels": 3},
    "Seq2Seq": {"vocab_size": 31, "hidden_size": 16},
    "SeriesRegressor": {},
}
LENGTH = 70  # tokens: beyond the windows of the cases


def parity_cases() -> dict[str, Any]:
    """The cases of the parity benchmark; none where transformers is not installed."""
    if "parity" not in sys.modules:
        script = Path(__file__).parents[2] / "benchmarks" / "parity.py"
        spec = importlib.util.spec_from_file_location("parity", script)
        assert spec is not None and spec.loader is not None
        sys.modules["parity"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["parity"])
    return sys.modules["parity"].CASES


def published_configs(family: str) -> list[dict[str, Any]]:
    """Published configs of a family, as many as there are cases of it with another architecture or shape."""
    transformers = pytest.importorskip("transformers")
    found: list[dict[str, Any]] = []
    for case in parity_cases().values():
        values = getattr(transformers, case.config)(**case.values).to_dict()
        for part in (values, values.get("text_config"), values.get("vision_config")):  # a tower stands alone too
            if isinstance(part, dict) and part.get("model_type") == family and part not in found:
                found.append(part)
    assert found, f"benchmarks/parity.py has no case of the family {family}"
    return found


def models_of(family: str) -> Iterator[tuple[str, nn.Module]]:
    """Every architecture of a family at toy size, its parameters unfilled."""
    classes = lookup(FAMILIES, family, "model_type")
    for name, model_class in classes.items():
        if name in OWN:
            yield name, model_class(model_class.config_class(**OWN[name]))
    if OWN.keys() & classes.keys():
        return
    for values in published_configs(family):
        done = 0
        for name, model_class in classes.items():
            try:
                config = model_class.config_class.from_hf(values | {"architectures": [name]})
            except ConfigError:
                continue  # a sister family shares the table
            written = config.to_hf()
            names = (*written.get("architectures", [name]), *_heads(model_class))
            if written["model_type"] == family and name in names:
                done += 1
                yield name, model_class(config)
        assert done, values


def _heads(model_class: Any) -> list[str]:
    """The architecture of a class that shares its config with others."""
    return [model_class.architecture] if hasattr(model_class, "architecture") else []


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is taken and not filled holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def unfilled(model: nn.Module) -> list[str]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [n for n, t in tensors if t.is_meta or (t.is_floating_point() and t.isnan().any())]


@pytest.mark.peer
@pytest.mark.parametrize("family", FAMILIES)
def test_first_weights_fill_everything_also_off_the_meta_device(family):
    for name, direct in models_of(family):
        for p in direct.parameters():
            p.data.fill_(float("nan"))
        init_weights(direct, seed=3)
        assert not unfilled(direct), name
        with torch.device("meta"):
            late = type(direct)(direct.config)
        with poisoned():
            late.to_empty(device="cpu")
        assert unfilled(late), name
        for module in late.modules():
            if hasattr(module, "reset_buffers"):
                module.reset_buffers(torch.device("cpu"))
        init_weights(late, seed=3)
        assert not unfilled(late), name
        both = zip(
            (*direct.named_parameters(), *direct.named_buffers()),
            (*late.named_parameters(), *late.named_buffers()),
            strict=True,
        )
        assert all(n == m and torch.equal(a, b) for (n, a), (m, b) in both), name


@pytest.mark.peer
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_is_the_same_and_its_headers_tell_the_truth(family, tmp_path):
    for number, (name, model) in enumerate(models_of(family)):
        init_weights(model, seed=number)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        folder = tmp_path / str(number)
        save_model(model, folder)
        with poisoned():
            again = load_model(folder)
        assert type(again) is type(model) and again.config == model.config, name
        assert not unfilled(again), name
        first, second = model.state_dict(), again.state_dict()
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first), name
        for one, other in tied_names(model).items():  # one tensor, not two equal ones
            assert second[one].data_ptr() == second[other].data_ptr(), (name, one)
            assert again.get_parameter(one) is again.get_parameter(other), (name, one)
        summary = summarize(folder)
        count = sum(p.numel() for p in model.parameters())
        stored = sum(t.nbytes for n, t in first.items() if n not in tied_names(model))  # with buffers that are saved
        assert summary.parameters == count and summary.nbytes == stored, name
        assert summary.active_parameters <= count and sum(part.nbytes for part in summary.parts) == summary.nbytes
        other_share = sum(part.parameters for part in summary.parts if part.name == "other") / count
        assert other_share < (0.25 if name in OWN else 0.02), (
            name,
            [t.name for t in summary.tensors if t.part == "other"][:9],
        )


def numbers_kept(state: Any, layer: int) -> int:
    """How many numbers a state holds for one layer of one sequence."""
    count = sum(t.numel() for t in state.memory(layer).values())
    if layer in state._keys:
        keys, values = state._keys[layer]
        kept = min(keys.shape[1], state.lengths[layer])
        count += keys[:, :kept].numel() + values[:, :kept].numel()
    return count


@pytest.mark.peer
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_as_large_as_its_layout_says(family):
    for name, model in models_of(family):
        if not hasattr(model, "cache_layout"):
            continue
        init_weights(model, seed=1).eval()
        ids = torch.randint(1, 9, (1, LENGTH), generator=torch.Generator().manual_seed(0))
        state = model.new_state(batch_size=1)
        with torch.no_grad():
            for piece in ids.split([LENGTH - 2, 1, 1], dim=1):
                model(piece, positions=state.positions(piece.shape[1]), state=state)
        for index, layer in enumerate(model.cache_layout()):
            spare = layer.size(LENGTH) - numbers_kept(state, index)
            # A window needs one position less than it is wide: the newest token is not in the past.
            allowed = {0, layer.num_kv_heads * (layer.key_dim + layer.value_dim)} if layer.window else {0}
            assert spare in allowed, (name, index, layer, numbers_kept(state, index))
