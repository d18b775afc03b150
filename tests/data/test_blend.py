"""A recipe's data section: sources of every make in their shares, rows in the order of a curriculum."""

import numpy as np
import pytest

from modelwright.base.config import build, to_dict
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import write_jsonl
from modelwright.data.blend import Blend, BlendConfig, BlendSource, DifficultyConfig, read_difficulties
from modelwright.data.curriculum import CurriculumConfig
from modelwright.data.pack import IGNORED
from modelwright.data.plan import read_pipeline
from modelwright.data.run import RunParams, run_pipeline
from modelwright.data.token_shards import write_token_shards
from modelwright.tokenizer.train import train_bpe

WORDS = "alpha beta gamma delta epsilon zeta eta theta".split()
TEXTS = [" ".join(WORDS[(i + j) % 8] for j in range(3 + 5 * (i % 9))) for i in range(60)]
SORTED = CurriculumConfig(kind="sorted")


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


def write_source(folder, texts, **more):
    rows = [{"id": f"{folder.name}/{i}", "text": text, **more} for i, text in enumerate(texts)]
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", rows)
    return folder


def sealed(tmp_path, **settings):
    """What mw data run makes of the texts."""
    source = write_source(tmp_path / "raw", TEXTS) / "train.jsonl"
    pipeline = {"source": {"path": str(source)}, "steps": ["clean"], "out": str(tmp_path / "sealed"), **settings}
    run_pipeline(read_pipeline(pipeline), RunParams(num_workers=1))
    return tmp_path / "sealed"


def rows_of(feed, num):
    batches = [feed.next_batch() for _ in range(num)]
    return np.concatenate([batch.input_ids.numpy() for batch in batches])


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        ({}, {"train.jsonl"}),
        ({"shard": {"out_bytes": 1500}}, {"train-00000.jsonl", "train-00001.jsonl"}),
        ({"format": "parquet"}, {"train.parquet"}),
        ({"format": "parquet", "shard": {"out_bytes": 1500}}, {"train-00000.parquet", "train-00001.parquet"}),
    ],
    ids=["lines", "many files", "parquet", "many parquet files"],
)
def test_every_make_of_a_sealed_data_set_gives_the_same_rows(tmp_path, tokenizer, settings, files):
    if settings.get("format"):
        pytest.importorskip("pyarrow")
    folder = sealed(tmp_path, **settings)
    assert files <= {file.name for file in folder.iterdir()}
    write_token_shards([f"{text}\n" for text in TEXTS], tokenizer, tmp_path / "tokens")
    made, expected = (
        Blend(BlendConfig((BlendSource(path),)), tokenizer, 16, tmp_path / "work")
        for path in (folder, tmp_path / "tokens")
    )
    assert made.num_tokens == expected.num_tokens
    assert (rows_of(made.feed(4, seed=3), 9) == rows_of(expected.feed(4, seed=3), 9)).all()


def test_sources_come_in_their_shares_and_the_texts_are_encoded_once(tmp_path, tokenizer):
    web, books = write_source(tmp_path / "web", ["alpha " * 400]), write_source(tmp_path / "books", ["beta " * 100])
    config = BlendConfig((BlendSource(web, weight=3.0), BlendSource(books, weight=1.0)))
    blend = Blend(config, tokenizer, 8, tmp_path / "work")
    beta = tokenizer.encode(" beta")[0]
    is_book = (rows_of(blend.feed(4, seed=0), 25) == beta).any(axis=1)
    assert is_book.sum() == 25
    told = blend.describe(100)
    assert [row["share"] for row in told] == [0.75, 0.25]
    assert told[1]["num_epochs"] == pytest.approx(25 / len(blend.rows[1]))
    (web / "train.jsonl").write_text('{"text": "changed while the run was down"}\n')
    again = Blend(config, tokenizer, 8, tmp_path / "work")
    assert (rows_of(again.feed(4, seed=0), 25) == rows_of(blend.feed(4, seed=0), 25)).all()


def test_temperature_moves_shares_of_sizes_towards_equal(tmp_path, tokenizer):
    sources = tuple(
        BlendSource(write_source(tmp_path / name, ["alpha " * count]))
        for name, count in (("large", 900), ("small", 100))
    )
    shares = [
        list(Blend(BlendConfig(sources, temperature=t), tokenizer, 8, tmp_path / "work").shares.values())[0]
        for t in (1.0, 2.0, float("inf"))
    ]
    assert shares == pytest.approx([0.9, 0.75, 0.5], abs=0.01)


def lengths_in_order(blend, num_epochs=1):
    """Of each row as it comes: the mean length of the documents in it."""
    feed, found = blend.feed(1, seed=1), []
    for _ in range(len(blend.rows[0]) * num_epochs):
        batch = feed.next_batch()
        trained = int((batch.labels != IGNORED).sum())
        found.append(trained / int((batch.positions[batch.labels != IGNORED] == 0).sum()))
    return found


@pytest.mark.parametrize("by", ["length", "perplexity", "field"])
def test_a_curriculum_brings_rows_of_easy_documents_first(tmp_path, tokenizer, by):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"text": t, "metadata": {"level": -len(t)}} for t in TEXTS])
    given = {"length": {}, "perplexity": {"model": tmp_path / "model"}, "field": {"field": "level"}}[by]
    config = BlendConfig(
        (BlendSource(folder),), rows="documents", curriculum=SORTED, difficulty=DifficultyConfig(by, **given)
    )
    asked = []

    def score(shards):
        asked.append(shards.folder)
        return 1.0 / shards.lengths()

    blend = Blend(config, tokenizer, 64, tmp_path / "work", score)
    found = lengths_in_order(blend)
    first, last = np.mean(found[: len(found) // 3]), np.mean(found[-(len(found) // 3) :])
    assert (first < 0.6 * last) if by == "length" else (first > 1.6 * last)
    Blend(config, tokenizer, 64, tmp_path / "work", score)
    assert len(asked) == (1 if by == "perplexity" else 0), "what was scored is kept with the run"


def test_without_a_curriculum_lengths_come_in_no_order(tmp_path, tokenizer):
    config = BlendConfig((BlendSource(write_source(tmp_path / "texts", TEXTS)),), rows="documents")
    found = lengths_in_order(Blend(config, tokenizer, 64, tmp_path / "work"))
    assert np.mean(found[: len(found) // 3]) == pytest.approx(np.mean(found[-(len(found) // 3) :]), rel=0.35)


def test_every_token_comes_once_an_epoch_in_a_curriculum_too(tmp_path, tokenizer):
    config = BlendConfig(
        (BlendSource(write_source(tmp_path / "texts", TEXTS)),),
        rows="documents",
        curriculum=CurriculumConfig(kind="stages", num_stages=3, review_fraction=0.2),
        difficulty=DifficultyConfig("length"),
    )
    blend = Blend(config, tokenizer, 64, tmp_path / "work")
    rows = blend.rows[0].rows(np.arange(len(blend.rows[0])))
    assert int((rows.labels != IGNORED).sum()) == blend.num_tokens
    ids = rows_of(blend.feed(1, seed=5), len(blend.rows[0]))
    assert sorted(map(tuple, ids)) == sorted(map(tuple, rows.input_ids))


def test_the_section_is_read_from_a_recipe_and_back(tmp_path):
    values = {
        "sources": [{"path": "a", "weight": 2}, {"path": "b", "weight": 1}],
        "temperature": 2,
        "rows": "documents",
        "curriculum": {"kind": "stages"},
        "difficulty": {"by": "field", "field": "level"},
    }
    config = build(BlendConfig, values)
    assert build(BlendConfig, to_dict(config)) == config and config.sources[0].weight == 2.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": []}, "sources is empty"),
        ({"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}, "b has no weight and others have one"),
        ({"sources": [{"path": "a", "weight": 1}]}, "has one source, so its weight and temperature change nothing"),
        ({"sources": [{"path": "a"}], "temperature": 2}, "change nothing"),
        ({"sources": [{"path": "a"}, {"path": "b"}], "temperature": 0}, "it must be above 0"),
        ({"sources": [{"path": "a", "weight": 0}, {"path": "b", "weight": 1}]}, "weight that is not above 0"),
        ({"sources": [{"path": "a"}], "difficulty": {"by": "length"}}, "a difficulty such an order"),
        ({"sources": [{"path": "a"}], "curriculum": {"kind": "sorted"}}, "an order other than random needs"),
        (
            {"sources": [{"path": "a"}], "curriculum": {"kind": "sorted"}, "difficulty": {"by": "length"}},
            "Set data.rows to documents",
        ),
        ({"sources": [{"path": "a"}], "difficulty": {"by": "perplexity"}}, "belongs to by: perplexity"),
        ({"sources": [{"path": "a"}], "difficulty": {"by": "length", "field": "x"}}, "belongs to by: field"),
        ({"sources": [{"path": "a"}], "difficulty": {"by": "size"}}, "known: length, perplexity, field"),
        ({"sources": [{"path": "a"}], "row": "stream"}, "Did you mean rows"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        build(BlendConfig, values)


def test_sources_that_cannot_be_read_are_named(tmp_path, tokenizer):
    def open_blend(path, **settings):
        Blend(BlendConfig((BlendSource(path),), **settings), tokenizer, 8, tmp_path / "work")

    with pytest.raises(DataError, match="holds no train.jsonl and no shards of it"):
        open_blend(tmp_path)
    write_token_shards(TEXTS, train_bpe(TEXTS, 280), tmp_path / "others")
    with pytest.raises(DataError, match="written by another tokenizer"):
        open_blend(tmp_path / "others")
    ordered = {"rows": "documents", "curriculum": SORTED, "difficulty": DifficultyConfig("field", field="level")}
    for level in ("hard", True, None, "nan"):
        write_source(tmp_path / "texts", ["some words"], level=level)
        with pytest.raises(DataError, match=r"train.jsonl, entry 1: level is .*expected a number"):
            open_blend(tmp_path / "texts", **ordered)
    write_token_shards(TEXTS, tokenizer, tmp_path / "plain")
    with pytest.raises(DataError, match="keeps no difficulties of its documents"):
        open_blend(tmp_path / "plain", **ordered)


def test_token_shards_keep_difficulties_of_the_texts_that_they_hold(tmp_path, tokenizer):
    write_source(tmp_path / "texts", ["one two", "", "three"])
    rows = [{"text": t, "level": i} for i, t in enumerate(["one two", "", "three"])]
    write_jsonl(tmp_path / "texts" / "train.jsonl", rows)
    numbers = read_difficulties(tmp_path / "texts", "level")
    write_token_shards([row["text"] for row in rows], tokenizer, tmp_path / "tokens", difficulties=numbers)
    config = BlendConfig(
        (BlendSource(tmp_path / "tokens"),),
        rows="documents",
        curriculum=SORTED,
        difficulty=DifficultyConfig("field", field="level"),
    )
    assert Blend(config, tokenizer, 8, tmp_path / "work").difficulties[0].tolist() == [0.0, 2.0]
