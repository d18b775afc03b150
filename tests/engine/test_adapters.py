"""Adapters in a batch compute what each computes alone, share no prefix, keep to their memory, and leave by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.conftest import VOCAB_SIZE, make_model, needs_bf16

from modelwright.base.errors import CapacityError, CheckpointError, ConfigError, RequestError
from modelwright.base.types import SamplingParams
from modelwright.engine.engine import Engine, EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.prepare import rounded
from modelwright.models.adapter_file import read_adapter_parts
from modelwright.models.llama import Llama
from modelwright.nn.kernels import build
from modelwright.nn.lora import add_lora, lora_layers, lora_parameters, merge_lora
from modelwright.nn.nf4 import NF4Linear
from modelwright.train.adapter import load_adapter, save_adapter

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, seed=7, max_tokens=12, ignore_eos=True)
ADAPTERS = {"one": 4, "two": 16, "three": 8}


def make_adapter(folder: Path, seed: int, rank: int = 8, **options: object) -> Path:
    model = make_model()
    targets = options.pop("targets", ("q", "v", "o", "up", "down"))
    add_lora(model, targets, rank=rank, alpha=2.0 * rank, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 / rank**0.5)
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(root / name, seed, rank, use_rslora=name == "two")
        for seed, (name, rank) in enumerate(ADAPTERS.items())
    }


def prompts(num: int, length: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCAB_SIZE, (num, length), generator=generator).tolist()


def with_adapters(model: Llama, folders: dict[str, Path], **config: object) -> LLM:
    llm = LLM(model, config=EngineConfig(**config))  # type: ignore[arg-type]
    for name, folder in folders.items():
        llm.load_adapter(name, folder)
    return llm


def answers(llm: LLM, names: list[str | None], params: SamplingParams = GREEDY) -> list[object]:
    done = llm.generate(prompts(len(names)), params, adapter=names)
    return [(c.token_ids, c.logprobs) for c in done]


@needs_bf16
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("config", [{}, {"max_tokens_per_step": 17}, {"num_blocks": 12}], ids=str)
def test_a_mixed_batch_is_bitwise_each_adapter_alone(model_bf16, folders, params, config):
    names = ["one", None, "two", "three", "one", "two", None, "three"]
    mixed = answers(with_adapters(model_bf16, folders, **config), names, params)
    for at, name in enumerate(names):
        alone = LLM(model_bf16)
        for other, folder in folders.items():
            alone.load_adapter(other, folder)
        done = alone.generate(prompts(len(names))[at], params, adapter=name)[0]
        assert (done.token_ids, done.logprobs) == mixed[at]
    assert len({ids for ids, _ in mixed}) == len(names)  # the adapters do something, to every prompt


def test_a_mixed_batch_says_what_the_merged_models_say(model, folders):
    names: list[str | None] = ["one", None, "two", "three"]
    mixed = answers(with_adapters(model, folders), names)
    for at, name in enumerate(names):
        merged = make_model()
        if name is not None:
            load_adapter(merged, folders[name])
            merge_lora(merged)
        done = LLM(merged.eval()).generate(prompts(4)[at], GREEDY)[0]
        ids, logprobs = mixed[at]
        assert done.token_ids == ids
        assert max(abs(a - b) for a, b in zip(done.logprobs, logprobs, strict=True)) < 1e-3
    plain = LLM(model).generate(prompts(4)[0], GREEDY)[0]
    assert plain.token_ids != mixed[0][0]  # negative control


def test_what_is_computed_is_lora_linears_own(folders):
    theirs = make_model(torch.bfloat16)
    load_adapter(theirs, folders["two"])
    direct = LLM(theirs.eval()).generate(prompts(1), GREEDY)[0]
    beside = with_adapters(make_model(torch.bfloat16), folders).generate(prompts(1), GREEDY, adapter="two")[0]
    assert direct.token_ids == beside.token_ids
    assert max(abs(a - b) for a, b in zip(direct.logprobs, beside.logprobs, strict=True)) < 0.02


def test_the_model_is_as_it_was_after_a_step(model, folders):
    llm = with_adapters(model, folders)
    names = [name for name, _ in model.named_modules()]
    llm.generate(prompts(2), GREEDY, adapter=["one", "two"])
    assert [name for name, _ in model.named_modules()] == names
    assert not any(module._forward_hooks for module in model.modules())


def test_two_adapters_never_share_a_prefix(model, folders):
    llm = with_adapters(model, folders)
    prompt = prompts(1)[0]
    for name in ("one", "two", None):
        assert llm.generate(prompt, GREEDY, adapter=name)[0].usage.cached_tokens == 0
    for name in ("one", "two", None):
        assert llm.generate(prompt, GREEDY, adapter=name)[0].usage.cached_tokens == 32


def test_a_prefix_follows_the_content_and_not_the_name(model, folders, tmp_path):
    llm = with_adapters(model, folders)
    prompt = prompts(1)[0]
    before = llm.generate(prompt, GREEDY, adapter="one")[0]
    llm.load_adapter("one", folders["two"])  # other weights under the same name
    after = llm.generate(prompt, GREEDY, adapter="one")[0]
    assert after.usage.cached_tokens == 0
    assert after.token_ids != before.token_ids
    llm.load_adapter("again", folders["one"])  # the same weights under another name
    assert llm.generate(prompt, GREEDY, adapter="again")[0].usage.cached_tokens == 32


def test_an_unknown_adapter_is_refused_by_name(model, folders):
    llm = with_adapters(model, folders)
    with pytest.raises(RequestError, match="'four' is not loaded. Loaded: one, two, three") as caught:
        llm.generate(prompts(1), GREEDY, adapter="four")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    with pytest.raises(RequestError, match="2 prompts and 1 adapters"):
        llm.generate(prompts(2), GREEDY, adapter=["one"])


def test_requests_that_run_end_with_the_weights_they_began_with(model, folders):
    expected = with_adapters(model, folders).generate(prompts(1), GREEDY, adapter="one")[0].token_ids
    engine = Engine(model)
    engine.adapters.load("one", folders["one"])
    request = engine.add(prompts(1)[0], GREEDY, {"adapter": "one"})
    engine.step()
    engine.adapters.unload("one")
    assert engine.adapters.num_bytes > 0  # held until the request ends
    with pytest.raises(RequestError, match="'one' is not loaded. Loaded: none"):
        engine.add(prompts(1)[0], GREEDY, {"adapter": "one"})
    while engine.has_work:
        engine.step()
    assert request.output_ids == expected
    assert engine.adapters.num_bytes == 0


def test_memory_goes_to_the_adapters_used_last(model, folders):
    probe = with_adapters(model, folders).engine.adapters
    sizes = {name: probe.get(name).num_bytes for name in folders}
    llm = LLM(model, config=EngineConfig(adapter_bytes=sizes["two"] + sizes["one"]))
    shelf = llm.engine.adapters
    for name, folder in folders.items():
        llm.load_adapter(name, folder)
    assert shelf.names == ["one", "two", "three"]
    assert shelf.num_bytes <= shelf.max_bytes
    alone = {n: with_adapters(model, folders).generate(prompts(1), GREEDY, adapter=n)[0].token_ids for n in folders}
    for name in ("one", "two", "three", "one"):  # each is read again when its turn comes
        assert llm.generate(prompts(1), GREEDY, adapter=name)[0].token_ids == alone[name]
        assert shelf.num_bytes <= shelf.max_bytes


def test_no_adapter_in_use_is_dropped(model, folders):
    engine = Engine(model, config=EngineConfig(adapter_bytes=160_000))
    engine.adapters.load("two", folders["two"])
    engine.add(prompts(1)[0], GREEDY, {"adapter": "two"})
    with pytest.raises(CapacityError, match="adapters in use take"):
        engine.adapters.load("three", folders["three"])
    engine.abort_all()
    engine.adapters.load("three", folders["three"])
    with pytest.raises(ConfigError, match="adapter_bytes"):
        Engine(model, config=EngineConfig(adapter_bytes=10)).adapters.load("two", folders["two"])


def test_an_adapter_that_changed_on_disk_is_not_mixed_with_its_former_self(model, tmp_path):
    folder = make_adapter(tmp_path / "a", 1)
    big = make_adapter(tmp_path / "b", 2)
    shelf = Engine(model, config=EngineConfig(adapter_bytes=100_000)).adapters
    shelf.load("a", folder)
    shelf.load("b", big)  # no room for both
    make_adapter(folder, 5)
    with pytest.raises(CheckpointError, match="has changed since it was loaded. Load it again"):
        shelf.get("a")
    shelf.load("a", folder)


def _edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def _swap(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD = {
    "another kind": (lambda f: _edit(f, peft_type="IA3"), "peft_type is 'IA3'"),
    "no rank": (lambda f: _edit(f, r="eight"), "r is 'eight'"),
    "biases": (lambda f: _edit(f, bias="all"), "bias is 'all'"),
    "not json": (lambda f: (f / "adapter_config.json").write_text("{"), "not a readable adapter folder"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
    "cut short": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:999]),
        "not a whole safetensors",
    ),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "Pickled weights .* are not opened",
    ),
    "another shape": (lambda f: _swap(f, lambda t: {**t, KEY: torch.zeros(8, 32)}), r"q_proj has shape \(8, 32\)"),
    "another base": (
        lambda f: _swap(f, lambda t: {**t, KEY.replace("layers.0", "layers.9"): torch.zeros(8, 64)}),
        "layers.9.self_attn.q_proj.lora_A.weight belongs to no linear layer",
    ),
    "half a pair": (lambda f: _swap(f, lambda t: {k: v for k, v in t.items() if k != KEY}), "expected A and B"),
    "not numbers": (
        lambda f: _swap(f, lambda t: {**t, KEY: torch.full((8, 64), float("nan"))}),
        "q_proj holds NaN or infinity",
    ),
    "nothing": (lambda f: _swap(f, lambda t: {}), "holds no adapter tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_is_refused_and_harms_nothing(model, folders, tmp_path, case):
    damage, message = BAD[case]
    llm = with_adapters(model, {"one": folders["one"]})
    before = llm.generate(prompts(1), GREEDY, adapter="one")[0].token_ids
    folder = make_adapter(tmp_path / "bad", 9)
    damage(folder)
    for name in ("bad", "one"):  # under a name of its own, and in place of one that serves
        with pytest.raises(CheckpointError, match=message):
            llm.load_adapter(name, folder)
    assert llm.engine.adapters.names == ["one"]
    assert llm.generate(prompts(1), GREEDY, adapter="one")[0].token_ids == before


def test_an_adapter_of_the_output_matrix_is_refused_by_name(model, tmp_path):
    folder = make_adapter(tmp_path, 1, targets=("q", "lm_head"))
    with pytest.raises(CheckpointError, match="lm_head is an output matrix"):
        LLM(model).load_adapter("head", folder)


@pytest.mark.parametrize("name", ["", "../up", "a b", "-a", "a/../b", "x" * 129, "\u00e9", "a\n"])
def test_names_are_plain(model, folders, name):
    with pytest.raises(ConfigError, match="adapter's name"):
        LLM(model).load_adapter(name, folders["one"])


def test_chat_and_streams_take_an_adapter(model, folders, tokenizer):
    llm = LLM(model, tokenizer=tokenizer, adapters=folders)
    whole = llm.generate("the quick", GREEDY, adapter="two")[0]
    streamed = [t for d in llm.stream_prompt("the quick", GREEDY, adapter="two") for t in d.token_ids]
    assert tuple(streamed) == whole.token_ids != llm.generate("the quick", GREEDY)[0].token_ids
    assert len(read_adapter_parts(model, folders["one"])) == len(lora_layers(_adapted(folders["one"])))


def _adapted(folder: Path) -> Llama:
    model = make_model()
    load_adapter(model, folder)
    return model


@pytest.mark.skipif(build.missing() is not None, reason=f"no CPU kernels: {build.missing()}")
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_the_compiled_step_mixes_adapters_and_agrees_with_pytorch(model_bf16, folders, quantize):
    names: list[str | None] = ["one", None, "two", "three", "one", "two"]
    base = rounded(model_bf16, quantize) if quantize else model_bf16
    mixed = answers(with_adapters(base, folders, kernels="native"), names)
    for config in ({"max_tokens_per_step": 17}, {"num_blocks": 12}):  # however the work is cut
        assert answers(with_adapters(base, folders, kernels="native", **config), names) == mixed
    for at, name in enumerate(names):
        alone = with_adapters(base, folders, kernels="native")
        done = alone.generate(prompts(len(names))[at], GREEDY, adapter=name)[0]
        assert (done.token_ids, done.logprobs) == mixed[at]
    # The twin: what PyTorch says of the same texts, within the rounding of activations.
    told = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=True)
    both = [
        with_adapters(base, folders, kernels=kernels).generate(prompts(6), told, adapter=names)
        for kernels in ("native", "plain")
    ]
    for ours, theirs in zip(*both, strict=True):
        near = [abs(a - b) for a, b in zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True)]
        assert sum(near) / len(near) < (0.12 if quantize else 0.06)
    swapped = with_adapters(base, folders, kernels="plain").generate(prompts(6), told, adapter=names[::-1])
    far = [abs(a - b) for a, b in zip(both[0][0].prompt_logprobs[1:], swapped[0].prompt_logprobs[1:], strict=True)]
    assert sum(far) / len(far) > 0.5  # negative control: another adapter says something else


def test_adapters_stand_beside_an_nf4_base(model_bf16, folders):
    base = rounded(model_bf16, "nf4")
    assert isinstance(base.layers[0].attention.q, NF4Linear)
    llm = with_adapters(base, folders)
    mixed = answers(llm, ["one", None, "two"])
    assert len({ids for ids, _ in mixed}) == 3
    with pytest.raises(ConfigError, match="rounded already"):
        rounded(base, "int4")
