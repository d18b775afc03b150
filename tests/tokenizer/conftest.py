"""Small real tokenizers of each kind that published models carry."""

import argparse
import inspect
import json
import textwrap
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.tokenizer.train import train_bpe

TEXTS = [
    textwrap.dedent(inspect.getdoc(argparse) or ""),
    inspect.getsource(argparse),
    inspect.getsource(textwrap),
    "Über den Wolken muss die Freiheit wohl grenzenlos sein. 吾輩は猫である。名前はまだ無い。 नमस्ते दुनिया 👩‍👩‍👧 " * 20,
]

LLAMA3_TEMPLATE = (
    "{{- bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def write_folder(folder: Path, backend: tokenizers.Tokenizer, template: str | None, **roles: str) -> Path:
    """Lay out a model folder as published ones are."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def special(text: str, **flags: bool) -> AddedToken:
    return AddedToken(text, special=True, normalized=False, **flags)


def llama2_like() -> tokenizers.Tokenizer:
    """SentencePiece BPE with byte fallback, a space in front, and a BOS from the post-processor."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *byte_pieces], show_progress=False, max_token_length=12
    )
    backend.train_from_iterator((word for text in TEXTS for word in text.split(" ")[:1500]), trainer)
    return with_llama_parts(backend)


def with_llama_parts(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    file = json.loads(backend.to_str())
    file["added_tokens"] = file["added_tokens"][:3]  # byte pieces are ordinary vocabulary
    backend = tokenizers.Tokenizer.from_str(json.dumps(file))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def llama2_metaspace() -> tokenizers.Tokenizer:
    """The newer spelling of the same: a space in front of the text's very beginning only."""
    file = json.loads(llama2_like().to_str())
    file["normalizer"] = None
    file["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return tokenizers.Tokenizer.from_str(json.dumps(file))


def llama3_like() -> tokenizers.Tokenizer:
    """Byte-level BPE whose BOS comes from both the post-processor and the chat template."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = tokenizers.Tokenizer.from_str(train_bpe(TEXTS, 600, names)._backend.to_str())
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", pair="$A $B", special_tokens=[("<|begin_of_text|>", 0)]
            ),
        ]
    )
    return backend


def unigram_like() -> tokenizers.Tokenizer:
    """A Unigram vocabulary that holds "</s>" as a piece, as T5's does."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0)]
    pieces += [(char, -4.0) for char in "abcdefghijklmnopqrstuvwxyz<>/|_"]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    backend.add_special_tokens([special("<unk>"), special("</s>")])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A $B", special_tokens=[("</s>", 1)])
    return backend


@pytest.fixture(scope="session")
def house() -> Tokenizer:
    return train_bpe(TEXTS, 800)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by kind."""
    root = tmp_path_factory.mktemp("published")
    llama = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    header = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return {
        "llama2": write_folder(root / "llama2", llama2_like(), LLAMA2_TEMPLATE, **llama),
        "metaspace": write_folder(root / "metaspace", llama2_metaspace(), LLAMA2_TEMPLATE, **llama),
        "llama3": write_folder(root / "llama3", llama3_like(), LLAMA3_TEMPLATE, **header),
        "unigram": write_folder(root / "unigram", unigram_like(), None, eos_token="</s>", unk_token="<unk>"),
    }


@pytest.fixture(params=["llama2", "metaspace", "llama3", "unigram"])
def foreign(request: pytest.FixtureRequest, published: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(published[request.param])
