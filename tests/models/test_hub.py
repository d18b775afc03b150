"""A folder is itself; what is neither a folder nor reachable is refused with a reason."""

import huggingface_hub.constants
import pytest

from modelwright.base.errors import CheckpointError
from modelwright.models import hub


def test_a_folder_is_returned_as_it_is(tmp_path):
    assert hub.fetch(tmp_path) == tmp_path
    assert hub.fetch(str(tmp_path)) == tmp_path


def test_refuses_a_file_and_a_path_that_is_not_there(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file"):
        hub.fetch(tmp_path / "model.gguf")
    for name in (str(tmp_path / "nothing"), "./nothing", "nothing", "a/b/c"):
        with pytest.raises(CheckpointError, match="There is no folder"):
            hub.fetch(name)


def test_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"'sentence-transformers/nothing-here' is not on this machine"):
        hub.fetch("sentence-transformers/nothing-here")


def test_a_malformed_id_is_refused():
    with pytest.raises(CheckpointError, match="well-formed hub id"):
        hub.fetch("bad owner/na me")


def test_pickles_are_never_asked_for():
    assert not any(name.endswith(("bin", "pt", "pth", "ckpt", "*")) for name in hub.WANTED_FILES)
