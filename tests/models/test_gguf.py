import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelwright as mw
from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.base.gguf_file import GgufFile, NewTensor, write_container
from modelwright.base.registry import lookup
from modelwright.models import FAMILIES
from modelwright.models.gguf import DTYPES, read_gguf, write_gguf
from modelwright.models.gguf_names import ARCHITECTURE_OF, PUBLISHED, SETTINGS, TENSOR_NAMES
from modelwright.nn.init import init_weights
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.train import train_bpe

DATA = Path(os.environ.get("MODELWRIGHT_DATA", "/nonexistent"))
BASE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 128}
GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 24, "sliding_window": 8, "head_dim": 32}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama_tied_with_biases": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 32,
    },
    "llama3": {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3, "eos_token_id": [0, 2, 5]},
    "llama_linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_yarn": {
        "model_type": "qwen2",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "gemma": {"model_type": "gemma", "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", **GEMMA},
    "gemma3": {"model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 7, "rope_theta": 1e6},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 320,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "bert": {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
}


def build(name: str) -> nn.Module:
    values = CASES[name] if name in ("gpt2", "bert") else BASE | CASES[name]
    classes = lookup(FAMILIES, values["model_type"], "model_type")
    usual = "MistralForCausalLM" if name == "mistral" else PUBLISHED[ARCHITECTURE_OF[values["model_type"]]][1]
    model_class = classes[values.get("architectures", [usual])[0]]
    model: nn.Module = model_class(model_class.config_class.from_hf(values))
    init_weights(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that a missing one would show
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def output(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(0, 320, (2, 80), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        result = model(ids)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([Path(__file__).read_text(encoding="utf-8")], 300)


@pytest.mark.parametrize("name", CASES)
def test_a_model_comes_back_bit_for_bit(name: str, tmp_path: Path):
    model = build(name)
    write_gguf(model, None, tmp_path / "x.gguf", "f32")
    again = read_gguf(tmp_path / "x.gguf")
    assert torch.equal(output(again), output(model))
    assert not again.training
    if name != "bert":
        assert again.config == model.config


# What transformers takes from the settings of a file is little (no scaling, no window, head sizes of some families
# alone), so it is given the config of the same model; without it only these are read right.
READ_ALONE = ("llama", "qwen2")
UNREAD = ("bert", "gemma", "mistral", "llama_tied_with_biases")  # families and biases that its reader does not know


@pytest.mark.peer
@pytest.mark.parametrize("name", [name for name in CASES if name not in UNREAD])
def test_transformers_reads_what_is_written(name: str, tokenizer: Tokenizer, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    model = build(name)
    write_gguf(model, tokenizer, tmp_path / "x.gguf", "f32")
    known = {}
    if name not in READ_ALONE:
        mw.save_model(model, tmp_path / "folder")
        known = {"config": transformers.AutoConfig.from_pretrained(tmp_path / "folder")}
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", attn_implementation="eager", **known
    ).eval()
    ids = torch.randint(0, 320, (2, 80), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (peer(ids).logits - model(ids).logits).abs().max() < 1e-4


@pytest.mark.peer
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert"])
def test_names_and_shapes_are_those_of_the_reference(name: str, tmp_path: Path):
    """Every tensor that is written has a name that the reference package lists for the architecture."""
    gguf = pytest.importorskip("gguf")
    write_gguf(build(name), None, tmp_path / "x.gguf", "f16")
    kind = next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[kind]}
    for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        bare = tensor.name.rpartition(".")[0]
        numbers = [part for part in bare.split(".") if part.isdigit()]
        assert (bare.replace(f".{numbers[0]}.", ".{bid}.") if numbers else bare) in known
        assert tensor.tensor_type.name == (
            "F32" if len(tensor.shape) == 1 or "position" in bare or "types" in bare else "F16"
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_near_and_of_the_expected_size(dtype: str, tmp_path: Path):
    model = build("llama")
    write_gguf(model, None, tmp_path / "x.gguf", dtype)
    again = read_gguf(tmp_path / "x.gguf")
    expected = {"f16": torch.float16, "bf16": torch.bfloat16}.get(dtype, torch.float32)
    assert {p.dtype for p in again.parameters()} == {expected}
    again = read_gguf(tmp_path / "x.gguf", dtype=torch.float32)
    allowed = {"f32": 0, "f16": 2e-3, "bf16": 2e-2, "q8_0": 3e-2, "q4_0": 0.5, "q4_1": 0.5}.get(dtype, 0.5)
    scale = output(model).abs().max()
    assert (output(again) - output(model)).abs().max() <= allowed * scale
    types = {t.name: t.type for t in GgufFile(tmp_path / "x.gguf").tensors.values()}
    written = "Q8_0" if dtype.endswith("_k") else dtype.upper()  # rows of 64 are no whole blocks of 256
    assert types["blk.0.attn_q.weight"] == written
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert types["token_embd.weight"] == ("Q8_0" if dtype.startswith("q4") else written)


def test_a_model_of_whole_superblocks_is_written_in_k_formats(tmp_path: Path):
    CASES["wide"] = {**CASES["llama"], "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    try:
        model = build("wide")
    finally:
        del CASES["wide"]
    errors = {}
    for dtype in ("q4_0", "q4_k", "q5_k", "q6_k", "q8_0"):
        write_gguf(model, None, tmp_path / "x.gguf", dtype)
        errors[dtype] = float((output(read_gguf(tmp_path / "x.gguf")) - output(model)).norm() / output(model).norm())
        types = {t.name: t.type for t in GgufFile(tmp_path / "x.gguf").tensors.values()}
        assert types["blk.1.ffn_down.weight"] == dtype.upper()
        assert types["output.weight"] == {"q4_0": "Q8_0", "q8_0": "Q8_0"}.get(dtype, "Q6_K")
    assert errors["q4_0"] > errors["q4_k"] > errors["q5_k"] > errors["q6_k"] > errors["q8_0"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_keeps_its_dtype(dtype: torch.dtype, tmp_path: Path):
    model = build("llama").to(dtype)
    write_gguf(model, None, tmp_path / "x.gguf", "f16" if dtype == torch.float16 else "bf16")
    again = read_gguf(tmp_path / "x.gguf")
    assert torch.equal(output(again), output(model))


def test_rows_that_are_no_whole_blocks_are_written_as_f16_and_named(tmp_path: Path, caplog):
    values = BASE | CASES["llama"] | {"intermediate_size": 100}
    CASES["odd"] = values
    try:
        write_gguf(build("odd"), None, tmp_path / "x.gguf", "q8_0")
    finally:
        del CASES["odd"]
    types = {t.name: t.type for t in GgufFile(tmp_path / "x.gguf").tensors.values()}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q8_0"
    assert "blk.0.ffn_down.weight (rows of 100, F16) and 1 more: no whole blocks of Q8_0" in caplog.text


def test_the_tokenizer_comes_along_padded_to_the_embedding(tokenizer: Tokenizer, tmp_path: Path):
    write_gguf(build("llama"), tokenizer, tmp_path / "x.gguf", "f16")
    assert len(GgufFile(tmp_path / "x.gguf").metadata["tokenizer.ggml.tokens"]) == 320
    again = mw.load_tokenizer(tmp_path / "x.gguf")
    assert again.encode("def build(name)") == tokenizer.encode("def build(name)")
    assert again.vocab_size == tokenizer.vocab_size
    assert read_gguf(tmp_path / "x.gguf").config.eos_token_id == (tokenizer.eos_id,)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path):
    large = train_bpe([Path(__file__).read_text(encoding="utf-8")], 400)
    with pytest.raises(ConfigError, match="tokenizer has 400 tokens and the model 320"):
        write_gguf(build("llama"), large, tmp_path / "x.gguf", "f16")
    assert not list(tmp_path.iterdir())


def test_llama3_frequencies_of_a_foreign_file_are_recognised(tmp_path: Path):
    """Other writers leave the divisors of the frequencies alone in the file, without the settings they came from."""
    model = build("llama3")
    write_gguf(model, None, tmp_path / "x.gguf", "f32")
    file = GgufFile(tmp_path / "x.gguf")
    assert file.raw("rope_freqs.weight").view("<f4").max() == 8

    def rewrite(path: Path, **changes: Any) -> None:
        metadata = {k: v for k, v in file.metadata.items() if k != "modelwright.rope_scaling"} | changes
        tensors = [
            NewTensor(t.name, t.shape, t.type, lambda name=t.name: file.raw(name)) for t in file.tensors.values()
        ]
        write_container(path, metadata, tensors)

    rewrite(tmp_path / "y.gguf", **{"llama.context_length": 256})  # 256 / 8 = the original 32
    assert read_gguf(tmp_path / "y.gguf").config.rope_scaling == model.config.rope_scaling
    rewrite(tmp_path / "z.gguf", **{"llama.context_length": 1000})
    with pytest.raises(CheckpointError, match=r"z\.gguf: rope_freqs.weight .largest divisor 8. is not"):
        read_gguf(tmp_path / "z.gguf")


def changed(source: Path, path: Path, drop: str = "", add: NewTensor | None = None, **metadata: Any) -> Path:
    file = GgufFile(source)
    tensors = [
        NewTensor(t.name, t.shape, t.type, lambda name=t.name: file.raw(name))
        for t in file.tensors.values()
        if t.name != drop
    ]
    pairs = {k: v for k, v in (file.metadata | metadata).items() if v is not None}
    write_container(path, pairs, [*tensors, *([add] if add else [])])
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": "blk.1.ffn_up.weight"}, "lacks 1 tensors .*model.layers.1.mlp.up_proj.weight"),
        ({"drop": "token_embd.weight"}, "token_embd.weight is missing"),
        ({"general.architecture": "rwkv9"}, "architecture 'rwkv9'; read are llama"),
        ({"general.architecture": None}, "architecture None"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 1 << 31}, "llama.block_count is 2,147,483,648; expected 1 to"),
        ({"llama.context_length": 1 << 31}, "llama.context_length is 2,147,483,648; expected 1 to"),
        ({"llama.block_count": 0}, "llama.block_count is 0"),
        ({"llama.block_count": "two"}, "llama.block_count is 'two'"),
        ({"llama.attention.head_count_kv": [1, 2]}, "head_count_kv is .1, 2."),
        ({"llama.attention.head_count_kv": 3}, "num_kv_heads is 3"),
        ({"llama.embedding_length": 128}, "tensor model.embed_tokens.weight has shape"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "scaling.type is 'longrope'"),
        ({"modelwright.rope_scaling": "{"}, "modelwright.rope_scaling is no JSON"),
        ({"split.count": 3}, "one of 3 parts"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str):
    write_gguf(build("llama"), None, tmp_path / "x.gguf", "f32")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(changed(tmp_path / "x.gguf", tmp_path / "bad.gguf", **changes))
    assert "bad.gguf" in str(caught.value)


def test_tensors_without_a_place_and_unread_formats_are_refused_by_name(tmp_path: Path):
    write_gguf(build("llama"), None, tmp_path / "x.gguf", "f32")
    zeros = torch.zeros(4).numpy().view("uint8")
    extra = NewTensor("blk.0.surprise.weight", (4,), "F32", lambda: zeros)
    with pytest.raises(CheckpointError, match=r"no place for: blk\.0\.surprise\.weight"):
        read_gguf(changed(tmp_path / "x.gguf", tmp_path / "y.gguf", add=extra))
    blocks = torch.zeros(84, dtype=torch.uint8).numpy()
    unread = NewTensor("blk.0.ffn_up.weight", (1, 256), "Q2_K", lambda: blocks)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight is stored as Q2_K"):
        read_gguf(changed(tmp_path / "x.gguf", tmp_path / "y.gguf", drop="blk.0.ffn_up.weight", add=unread))


def test_a_vocabulary_is_no_model():
    path = DATA / "tokenizers/gguf/ggml-vocab-llama-spm.gguf"
    if not path.is_file():
        pytest.skip("MODELWRIGHT_DATA is not set")
    with pytest.raises(CheckpointError, match="vocabulary at most, no model"):
        read_gguf(path)


def test_what_gguf_cannot_say_is_refused_and_nothing_is_written(tmp_path: Path):
    with pytest.raises(ConfigError, match="dtype is 'q3'; GGUF files are written as f32"):
        write_gguf(build("llama"), None, tmp_path / "x.gguf", "q3")
    CASES["dynamic"] = {"model_type": "llama", "rope_scaling": DYNAMIC}
    CASES["windowed"] = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    try:
        with pytest.raises(ConfigError, match="rope scaling is 'dynamic'"):
            write_gguf(build("dynamic"), None, tmp_path / "x.gguf")
        with pytest.raises(ConfigError, match="use_sliding_window is true"):
            write_gguf(build("windowed"), None, tmp_path / "x.gguf")
    finally:
        del CASES["dynamic"], CASES["windowed"]
    broken = build("llama")
    with torch.no_grad():
        broken.layers[1].mlp.up.weight[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight holds nan"):
        write_gguf(broken, None, tmp_path / "x.gguf", "q8_0")
    assert not list(tmp_path.iterdir())


def test_every_gguf_family_has_all_its_tables():
    assert set(TENSOR_NAMES) == set(SETTINGS) == set(PUBLISHED)
    for table in TENSOR_NAMES.values():
        assert len(set(table.values())) == len(table)
        assert all(a.count("*") == b.count("*") for a, b in table.items())
    assert len(list(itertools.chain(*TENSOR_NAMES.values()))) > 80


def test_a_model_read_from_a_file_can_be_trained_and_leaves_the_file_alone(tmp_path: Path):
    model = build("qwen2")
    write_gguf(model, None, tmp_path / "x.gguf", "f32")
    before = (tmp_path / "x.gguf").read_bytes()
    again = read_gguf(tmp_path / "x.gguf")
    again(torch.arange(20)[None]).logits.logsumexp(-1).mean().backward()
    with torch.no_grad():
        for parameter in again.parameters():
            assert parameter.grad is not None
            parameter.add_(1.0)
    assert (tmp_path / "x.gguf").read_bytes() == before
    assert torch.equal(output(read_gguf(tmp_path / "x.gguf")), output(model))
    write_gguf(again, None, tmp_path / "x.gguf", "f32")  # over the file that is mapped
    assert torch.equal(output(read_gguf(tmp_path / "x.gguf")), output(again))
