"""Q4_0 and Q8_0 matrices stay in their bits and mean what the file says; the engine serves the file itself."""

from pathlib import Path

import pytest
import torch

from modelwright.base.types import SamplingParams
from modelwright.engine.llm import LLM
from modelwright.models.gguf import read_gguf, write_gguf
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.linear import dense_weight, linears
from modelwright.nn.lowbit import LowBitLinear
from modelwright.tokenizer.train import train_bpe

TEXT = "the quick brown fox jumps over the lazy dog "


def small_llama(*, tie_embeddings: bool) -> Llama:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4}
    return Llama(LlamaConfig(**sizes, num_kv_heads=2, tie_embeddings=tie_embeddings)).eval()


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize(("dtype", "bits"), [("q4_0", 4), ("q8_0", 8)])
def test_kept_matrices_mean_what_the_file_says(tmp_path: Path, dtype: str, bits: int, tie_embeddings: bool):
    file = tmp_path / "model.gguf"
    write_gguf(small_llama(tie_embeddings=tie_embeddings), None, file, dtype)
    whole = read_gguf(file, dtype=torch.float32)
    kept = read_gguf(file, dtype=torch.float32, is_packed=True)
    dense = dict(linears(whole))
    for name, layer in linears(kept):
        if name != "lm_head":
            assert isinstance(layer, LowBitLinear) and layer.bits == bits, name
        assert torch.equal(dense_weight(layer), dense[name].weight), name
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert (kept(ids).logits - whole(ids).logits).abs().max() < 1e-4


def test_other_types_are_multiplied_out(tmp_path: Path):
    file = tmp_path / "model.gguf"
    write_gguf(small_llama(tie_embeddings=False), None, file, "q4_1")
    model = read_gguf(file, dtype=torch.float32, is_packed=True)
    assert not any(isinstance(m, LowBitLinear) and m.bits == 4 for m in model.modules())


def test_the_engine_serves_the_file(tmp_path: Path):
    file = tmp_path / "model.gguf"
    write_gguf(small_llama(tie_embeddings=True), train_bpe([TEXT * 5], vocab_size=300), file, "q4_0")
    llm = LLM(file)
    assert isinstance(llm.engine.model.layers[0].attention.q, LowBitLinear)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    assert len(llm.generate("the quick", params)[0].token_ids) == 4
