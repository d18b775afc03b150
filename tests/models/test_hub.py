"""A folder is itself; what is neither a folder nor reachable is refused with a reason."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse

import huggingface_hub.constants
import pytest

from modelwright.base.artifact import verify
from modelwright.base.errors import CheckpointError
from modelwright.base.files import hash_file
from modelwright.models import hub
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_folder_is_returned_as_it_is(tmp_path):
    assert hub.fetch(tmp_path) == tmp_path
    assert hub.fetch(str(tmp_path)) == tmp_path


def test_refuses_a_file_and_a_path_that_is_not_there(tmp_path):
    for name in ("model.gguf", "model.bin"):
        (tmp_path / name).write_bytes(b"")
    assert hub.fetch(tmp_path / "model.gguf") == tmp_path / "model.gguf"  # whole in one file
    with pytest.raises(CheckpointError, match="is a file"):
        hub.fetch(tmp_path / "model.bin")
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


# A hub of our own: the two kinds of answers that the client asks for, over HTTP, with one small model.

PULL = """
import json, sys
from pathlib import Path
from modelwright.base.errors import ModelwrightError
from modelwright.models.hub import pull
try:
    print(json.dumps(pull(sys.argv[1], Path(sys.argv[2]), **json.loads(sys.argv[3]))))
except ModelwrightError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def little_hub(tmp_path):
    config = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2)
    save_model(init_weights(Llama(config), seed=1), tmp_path / "served")
    (tmp_path / "served" / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    (tmp_path / "served" / "modeling_evil.py").write_text("raise SystemExit")
    (tmp_path / "served" / "m.Q8_0.gguf").write_bytes(b"GGUF")
    files = {file.name: file.read_bytes() for file in (tmp_path / "served").iterdir()}
    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            asked.append((self.command, self.path))
            path = urllib.parse.urlparse(self.path).path
            name = path.rpartition("/")[2]
            if path.startswith("/api/models/maker/little/"):
                if "unheard-of" in path:
                    return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
                entries = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()]
                info = {"id": "maker/little", "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
                return self.reply(200, json.dumps(entries if "/tree/" in path else info).encode())
            if path == f"/maker/little/resolve/{COMMIT}/{name}" and name in files:
                tag = hashlib.sha256(files[name]).hexdigest()
                return self.reply(200, files[name], {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

        def reply(self, code, data, headers=None):
            self.send_response(code)
            for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(name, to, *, is_up=True, **options):
        port = server.server_port if is_up else 9
        env = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(tmp_path / "cache"),
            "NO_PROXY": "*",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-c", PULL, name, str(to), json.dumps(options)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    yield run, asked
    server.shutdown()
    server.server_close()


def test_pull_makes_an_artifact_with_commit_and_hashes_and_leaves_code_where_it_is(little_hub, tmp_path):
    run, asked = little_hub
    figures = run("maker/little", tmp_path / "m")
    assert figures["revision"] == COMMIT
    assert set(figures["files"]) == {"config.json", "model.safetensors", "generation_config.json"}
    assert not any(path.endswith((".bin", ".py", ".gguf")) for _, path in asked)
    manifest = verify(tmp_path / "m")
    assert manifest.settings["hub_id"] == "maker/little" and manifest.settings["revision"] == COMMIT
    for name, entry in figures["files"].items():
        assert entry["sha256"] == hash_file(tmp_path / "m" / name) == hash_file(tmp_path / "served" / name)
    assert load_model(tmp_path / "m").config == load_model(tmp_path / "served").config
    again = run("maker/little", tmp_path / "m", only=["*Q8_0.gguf"])  # replaces its own earlier pull
    assert "m.Q8_0.gguf" in again["files"] and not (tmp_path / "m" / "model.safetensors").exists()


def test_pull_refuses_with_a_reason_and_writes_nothing(little_hub, tmp_path):
    run, _ = little_hub
    to = tmp_path / "m"
    assert "has no revision 'unheard-of'" in run("maker/little", to, revision="unheard-of")["error"]
    assert "has no file *Q2_K.gguf" in run("maker/little", to, only=["*Q2_K.gguf"])["error"]
    assert "must end with one of" in run("maker/little", to, only=["*.bin"])["error"]
    assert "could not be reached" in run("maker/other", to, is_up=False)["error"]
    assert not to.exists()
    to.mkdir()
    (to / "thesis.txt").write_text("mine")
    assert "is no earlier pull of maker/little" in run("maker/little", to)["error"]
    assert [f.name for f in to.iterdir()] == ["thesis.txt"]
