import json
import os
import shutil
from pathlib import Path

import pytest

import modelwright as mw
from modelwright.base.errors import DataError
from modelwright.base.types import Message
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import load_tokenizer

DATA = Path(os.environ.get("MODELWRIGHT_DATA", "/nonexistent"))
SAMPLES = ["hello world", "", "  ", "a\n\n\nb  c", "x = {1: 'é'}\t# 12345", "吾輩は猫である 👩‍👩‍👧", "I'm THE'RE"]
TALK = [
    Message("user", "What is 2+2?"),
    Message("assistant", "4, é 👩‍👩‍👧"),
    Message("user", "\n Sure? "),
]


def test_saving_and_loading_keeps_everything(house: Tokenizer, tmp_path: Path):
    house.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for path in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
        again = mw.load_tokenizer(path)
        assert again.encode_batch(SAMPLES) == house.encode_batch(SAMPLES)
        assert again.chat_tokens(TALK) == house.chat_tokens(TALK)
        assert (again.special_ids, again.stop_ids, again.eos_id, again.pad_id, again.vocab_size) == (
            (house.special_ids, house.stop_ids, house.eos_id, house.pad_id, house.vocab_size)
        )
    house.save(tmp_path / "again")
    load_tokenizer(tmp_path).save(tmp_path / "third")
    assert (tmp_path / "third/tokenizer.json").read_bytes() == (tmp_path / "again/tokenizer.json").read_bytes()


def test_foreign_settings_survive_saving(published: dict, tmp_path: Path):
    folder = shutil.copytree(published["llama3"], tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"model_max_length": 77, "bos_token": {"content": "<|begin_of_text|>"}})
    )
    first = load_tokenizer(folder)
    first.save(tmp_path / "saved")
    second = load_tokenizer(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/tokenizer_config.json").read_text())["model_max_length"] == 77
    assert second.bos_id == first.bos_id == 0
    assert second.chat_tokens(TALK) == first.chat_tokens(TALK)
    assert second.encode_batch(SAMPLES) == first.encode_batch(SAMPLES)


@pytest.mark.parametrize(("value", "stops"), [(7, (4, 7)), ([1, 4], (4, 1)), (None, (4,)), ([True, "x", -1], (4, 1))])
def test_stop_ids_come_from_the_models_configs(published: dict, tmp_path: Path, value, stops):
    for name in ("generation_config.json", "config.json"):
        folder = shutil.copytree(published["llama3"], tmp_path / name)
        (folder / name).write_text(json.dumps({"eos_token_id": value}))
        assert load_tokenizer(folder).stop_ids == stops


def test_the_template_file_wins_and_lists_have_a_default(published: dict, tmp_path: Path):
    folder = shutil.copytree(published["llama3"], tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert load_tokenizer(folder).chat_template.startswith("{{- bos_token")
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(folder).chat_template == "D"
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "one"}))
    assert load_tokenizer(folder).render_chat([Message("user", "a")]) == "one"


def test_roles_come_from_the_special_tokens_map_too(published: dict, tmp_path: Path, caplog):
    folder = shutil.copytree(published["llama2"], tmp_path / "model")
    (folder / "tokenizer_config.json").write_text("{}")
    roles = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "<nowhere>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert "pad_token '<nowhere>'" in caplog.text


def test_fixed_padding_and_truncation_are_switched_off(house: Tokenizer, tmp_path: Path):
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(house._backend.to_str())
    backend.enable_padding(length=128)
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("one two three four five six") == house.encode("one two three four five six")


def damage(folder: Path, name: str, content: bytes | None) -> Path:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer.json .*tokenizer_config.json.*mw tokenizer"),
        ("tokenizer.json", b"", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", b'{"version": "1.0", "mod', "tokenizer.json is not valid JSON"),
        ("tokenizer.json", b"\xff\xfe\x00", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", b"[]", "is JSON, but no tokenizer"),
        ("tokenizer.json", b'{"hidden_size": 4}', "is JSON, but no tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "Nope"}}', "cannot be used as a tokenizer"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json holds a list"),
        ("generation_config.json", b"{", "generation_config.json is not valid JSON"),
        ("chat_template.jinja", b"\xff\xff", "chat_template.jinja is not UTF-8"),
    ],
)
def test_damaged_files_are_named(house: Tokenizer, tmp_path: Path, name: str, content: bytes | None, message: str):
    house.save(tmp_path)
    with pytest.raises(DataError, match=message):
        load_tokenizer(damage(tmp_path, name, content))


def test_a_missing_path_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.skipif(not DATA.is_dir(), reason="MODELWRIGHT_DATA is not set")
def test_gpt2_gives_the_published_ids(tmp_path: Path):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    source = DATA / "tokenizers"
    backend = tokenizers.Tokenizer(
        models.BPE.from_file(str(source / "gpt2/encoder.json"), str(source / "gpt2/vocab.bpe"))
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    texts = (source / "gguf/ggml-vocab-gpt-2.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (source / "gguf/ggml-vocab-gpt-2.gguf.out").read_text().split("\n")
    rows = [[int(x) for x in line.split()] for line in lines[: len(texts)]]
    assert len(texts) >= 46
    for text, ids in zip(texts, rows, strict=False):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text


# -- the same folder in transformers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def house_folder(house: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("house")
    house.save(folder)
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 800, "eos_token_id": [0, 2]}
    (folder / "config.json").write_text(json.dumps(llama))
    return folder


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["house", "llama2", "metaspace", "llama3"])
def test_transformers_gives_equal_ids_and_renderings(house_folder: Path, published: dict, kind: str):
    transformers = pytest.importorskip("transformers")
    folder = house_folder if kind == "house" else published[kind]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    for text in SAMPLES:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
    assert (ours.eos_id, ours.bos_id) == (theirs.eos_token_id, theirs.bos_token_id)
    rows = [{"role": m.role, "content": m.content} for m in TALK]
    for prompt in (False, True):
        assert ours.render_chat(TALK, prompt) == theirs.apply_chat_template(
            rows, tokenize=False, add_generation_prompt=prompt
        )
        expected = theirs.apply_chat_template(rows, add_generation_prompt=prompt, return_dict=True)["input_ids"]
        assert ours.apply_chat_template(TALK, add_generation_prompt=prompt) == expected


@pytest.mark.peer
def test_transformers_gives_the_same_mask_by_generation_tags(house_folder: Path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(house_folder)
    tagged = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    rows = [{"role": m.role, "content": m.content} for m in [*TALK, Message("assistant", "yes.")]]
    found = theirs.apply_chat_template(rows, chat_template=tagged, return_dict=True, return_assistant_tokens_mask=True)
    for tokenizer in (load_tokenizer(house_folder), load_tokenizer(house_folder).with_chat_template(tagged)):
        tokens = tokenizer.chat_tokens(rows)
        assert tokens.ids == found["input_ids"]
        assert [int(keep) for keep in tokens.assistant_mask] == found["assistant_masks"]
