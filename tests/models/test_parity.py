"""Every family equals its reference in transformers; the cases and the comparison are benchmarks/parity.py."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "parity.py"
spec = importlib.util.spec_from_file_location("parity", SCRIPT)
assert spec is not None and spec.loader is not None
parity = importlib.util.module_from_spec(spec)
sys.modules["parity"] = parity
spec.loader.exec_module(parity)


@pytest.mark.parametrize("name", parity.CASES)
def test_equals_the_reference(name, tmp_path):
    report = parity.run_case(name, tmp_path)
    assert report.is_equal, report


def test_a_wrong_model_is_told_apart(tmp_path):
    """Negative control: a window ignored, or a rotation of the other layout, is far outside of the bounds."""
    case = parity.CASES["mistral, window"]
    theirs = parity.make_reference(case)
    theirs.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config.replace('"sliding_window": 48', '"sliding_window": null'), "utf-8")
    ours = parity.load_model(tmp_path)
    inputs = parity.make_inputs(case, theirs.config)
    assert (ours(**inputs).logits - theirs(**inputs).logits).abs().max() > 100 * parity.MAX_ERROR


def test_what_is_not_a_number_is_no_agreement():
    case = parity.CASES["llama"]
    out = type("Out", (), {"logits": parity.torch.full((1, 2, 3), float("nan"))})()
    with pytest.raises(AssertionError, match="not a number"):
        parity._difference(case, out, out)
