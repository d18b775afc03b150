"""Ray Data gives the bytes that local processes give, and survives a worker's death."""

import json
from pathlib import Path

import pytest
from tests.data.trial_steps import AtLeast, DropCopies, Shout, Trouble

from modelwright.data.plan import PipelineConfig, SourceConfig, name_step
from modelwright.data.run import RunParams, run_pipeline
from modelwright.data.shards import ShardConfig

pytestmark = [pytest.mark.slow, pytest.mark.peer]


def test_ray_gives_the_same_bytes_and_sets_aside_what_kills_a_worker(tmp_path: Path):
    pytest.importorskip("ray.data")
    source = tmp_path / "in.jsonl"
    texts = [f"document {i % 30}" if i != 17 else "DIE" for i in range(40)]
    source.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    steps = tuple(name_step(type(step).__name__, step) for step in (Trouble(), Shout(), DropCopies(), AtLeast(3)))
    made = {}
    for engine in ("local", "ray"):
        config = PipelineConfig((SourceConfig(str(source)),), steps, tmp_path / engine, shard=ShardConfig(documents=10))
        result = run_pipeline(config, RunParams(engine=engine, num_workers=2))
        assert [row["position"] for row in result.asides] == ["in.jsonl, line 18"]
        made[engine] = {name: (tmp_path / engine / name).read_bytes() for name in ("train.jsonl", "removed.jsonl")}
    assert made["ray"] == made["local"]
