"""Does a recipe train what it says? Settings that must not change the result are changed, and the results compared.

The recipe's kind of model, objective, adapter, optimizer and schedule are made at toy size, on random tokens; a row of
the answer is one invariance. Gradients are compared parameter by parameter, not by the loss alone: the largest
difference over a parameter is taken relative to the largest number in its gradient. A check is a function in the table
`modelwright.train.CHECKS`; a method says in `modelwright.train.SUBJECTS` how its toy is made.

The checks compute in float32, so that a bound can tell rounding from error; resuming is checked in the recipe's own
precision and must be exact.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.base.device import can_compile
from modelwright.base.registry import lookup
from modelwright.data.load import RowLoader
from modelwright.data.pack import pack_rows
from modelwright.models.llama import ARCHITECTURE_OF, Llama, LlamaConfig
from modelwright.models.weights import read_config
from modelwright.nn.adalora import AdaLoraConfig
from modelwright.nn.init import init_weights
from modelwright.train import CHECKS, SUBJECTS
from modelwright.train.adalora import BudgetedRanks
from modelwright.train.adapt import adapt
from modelwright.train.checkpoint import CheckpointConfig
from modelwright.train.loop import LoopConfig, Run, train
from modelwright.train.objective import CausalLanguageModeling, Objective
from modelwright.train.parallel import ParallelConfig
from modelwright.train.recompute import RecomputeConfig

ALONE: dict[str, Any] = {"parallel": ParallelConfig(), "lengths": None}
VOCAB_SIZE, ROW_LEN, NUM_ROWS = 97, 24, 8
EXTRA_PADDING = 7
NOTHING = 1e-3  # of the largest gradient of a model
TOY_SIZES = {"rank": 4, "target_rank": 2, "width": 4, "num_tokens": 3, "dropout": 0.0}
Examples = list[tuple[list[int], list[bool]]]  # token ids, and which of them are learned


@dataclass(frozen=True)
class Subject:
    """A recipe at toy size."""

    make_model: Callable[[], nn.Module]  # the same weights every time
    make_objective: Callable[[], Objective]
    make_plain_objective: Callable[[], Objective] | None  # the same loss without pieces; None: it has none
    loop: LoopConfig  # the recipe's
    examples: Examples
    recipe: tuple[str, Any] = ("", None)  # method and settings, from which another process makes the same
    make_loader: Callable[[int, int], Any] | None = None  # of batches with so much more padding; None: of packed rows

    def loader(self, micro_batch_size: int, *, is_packed: bool = True) -> Any:
        """Return batches of the examples: packed into rows, or each in a row of its own."""
        if self.make_loader is not None:
            return self.make_loader(micro_batch_size, 0)
        if is_packed:
            rows = pack_rows(self.examples, ROW_LEN, 0)
            order = np.arange(NUM_ROWS) % len(rows)
            picked = replace(
                rows,
                input_ids=rows.input_ids[order],
                labels=rows.labels[order],
                document_ids=None if rows.document_ids is None else rows.document_ids[order],
            )
            return RowLoader(lambda _: picked, micro_batch_size)
        alone = [pack_rows([example], ROW_LEN, 0) for example in self.examples]
        joined = replace(
            alone[0],
            input_ids=np.concatenate([rows.input_ids for rows in alone]),
            labels=np.concatenate([rows.labels for rows in alone]),
            document_ids=np.concatenate([rows.document_ids for rows in alone if rows.document_ids is not None]),
        )
        return RowLoader(lambda _: joined, micro_batch_size)

    def gradients(
        self, loader: Any, *, num_micro: int = 1, objective: Objective | None = None, **changes: Any
    ) -> dict[str, Tensor]:
        """Return the gradient of every trained parameter after one step, and the loss under the name ``loss``."""
        plain: dict[str, Any] = {"num_steps": 4, "compile": False, "precision": "fp32", "max_grad_norm": None}
        config = replace(
            self.loop,
            **{**plain, "recompute": RecomputeConfig(), "grad_accum_steps": num_micro, "ema": None, **ALONE, **changes},
        )
        model = self.make_model()
        run = Run(model, objective or self.make_objective(), loader, config)
        seen: dict[str, Tensor] = {}

        def keep() -> None:
            seen.update(run.layout.whole_gradients(run.model))

        run.optimizer.step = keep  # type: ignore[method-assign]
        seen["loss"] = torch.tensor(run.do_step().loss)
        return seen


@dataclass(frozen=True)
class Finding:
    """One invariance: whether it holds. ``holds`` is None where this machine or recipe cannot check it."""

    name: str
    holds: bool | None
    largest_difference: float | None
    bound: float
    note: str = ""


def self_check(method: str, config: Any, names: Sequence[str] | None = None) -> list[Finding]:
    """Check a recipe's settings.

    Args:
        method: What the recipe names.
        config: Its settings.
        names: Which checks of the table; None: all.
    """
    subject = make_subject(method, config)
    return [lookup(CHECKS, name, "check")(subject) for name in (CHECKS if names is None else names)]


def make_subject(method: str, config: Any) -> Subject:
    """Make a recipe small."""
    subject: Subject = lookup(SUBJECTS, method, "method")(config)
    return replace(subject, recipe=(method, config))


def compare(name: str, found: dict[str, Tensor], expected: dict[str, Tensor], bound: float, note: str = "") -> Finding:
    """Compare two sets of gradients by name; a parameter that only one of them has is an infinite difference."""
    if found.keys() != expected.keys():
        missing = sorted(found.keys() ^ expected.keys())
        return Finding(name, False, float("inf"), bound, f"only one side has a gradient of {', '.join(missing)}")
    largest, where = 0.0, ""
    # Some gradients are nothing but rounding (a bias of keys, which the softmax does not see): these are held against
    # the largest of all.
    least = max(NOTHING * max(float(value.abs().max()) for key, value in expected.items() if key != "loss"), 1e-12)
    for key, value in expected.items():
        scale = max(float(value.abs().max()), least)
        difference = float((found[key] - value).abs().max()) / scale
        if not difference <= largest:
            largest, where = difference, key
    return Finding(name, largest <= bound, largest, bound, note or (f"largest in {where}" if where else ""))


def check_accumulation(subject: Subject) -> Finding:
    """One batch of eight rows gives the gradient of eight micro-batches of one."""
    whole = subject.gradients(subject.loader(NUM_ROWS))
    split = subject.gradients(subject.loader(1), num_micro=NUM_ROWS)
    return compare("accumulation 1x8 = 8x1", split, whole, 1e-4)


def check_packing(subject: Subject) -> Finding:
    """Examples packed into rows give the gradient of the same examples in rows of their own; or padded ones."""
    if subject.make_loader is not None:
        wide = subject.gradients(subject.make_loader(NUM_ROWS, EXTRA_PADDING))
        return compare("padded = padded further", wide, subject.gradients(subject.loader(NUM_ROWS)), 1e-4)
    rows = len(pack_rows(subject.examples, ROW_LEN, 0))
    packed = RowLoader(lambda _: pack_rows(subject.examples, ROW_LEN, 0), rows)
    alone = subject.loader(len(subject.examples), is_packed=False)
    return compare("packed = unpacked", subject.gradients(packed), subject.gradients(alone), 1e-4)


def check_resuming(subject: Subject) -> Finding:
    """A run that was stopped and taken up again has the weights of one that was not, bit for bit."""
    config = replace(
        subject.loop,
        parallel=ParallelConfig(),
        num_steps=5,
        compile=False,
        grad_accum_steps=2,
        checkpoint=CheckpointConfig(),
    )
    whole = train(subject.make_model(), subject.make_objective(), subject.loader(2), config)

    def stop(run: Run, report: Any) -> None:
        if report.step == 3:
            raise InterruptedError

    with tempfile.TemporaryDirectory() as name:
        saved = replace(config, checkpoint=CheckpointConfig(every=1))
        try:
            train(
                subject.make_model(),
                subject.make_objective(),
                subject.loader(2),
                saved,
                folder=Path(name),
                hooks=[stop],
            )
        except InterruptedError:
            pass
        model, objective = subject.make_model(), subject.make_objective()
        resumed = train(model, objective, subject.loader(2), saved, folder=Path(name))
    found, expected = (
        {**run.model.state_dict(), "loss": torch.tensor([loss for _, loss in run.losses])} for run in (resumed, whole)
    )
    return compare("resumed = uninterrupted, bitwise", found, expected, 0.0)


def check_recomputing(subject: Subject) -> Finding:
    """Activations computed again give the gradient of kept ones, by layer and selectively."""
    plain = subject.gradients(subject.loader(4))
    if not any(name.rpartition(".")[2] == "layers" for name, _ in subject.make_model().named_modules()):
        return Finding("recomputed = kept", None, None, 1e-5, "this model has no list of blocks to compute again")
    findings = [
        compare("recomputed = kept", subject.gradients(subject.loader(4), recompute=RecomputeConfig(way)), plain, 1e-5)
        for way in ("layers", "selective")
    ]
    return max(findings, key=lambda finding: finding.largest_difference or 0.0)


def check_pieces(subject: Subject) -> Finding:
    """The cross-entropy in pieces gives the gradient of the plain one."""
    name, bound = "cross-entropy in pieces = plain", 1e-4
    if subject.make_plain_objective is None:
        return Finding(name, None, None, bound, "this objective has no output matrix to cut")
    plain = subject.gradients(subject.loader(4), objective=subject.make_plain_objective())
    return compare(name, subject.gradients(subject.loader(4)), plain, bound)


def check_compiling(subject: Subject) -> Finding:
    """The compiled loss gives the gradient of the eager one, within the rounding of another order of sums."""
    name, bound = "compiled = eager", 1e-3
    if not can_compile():
        return Finding(name, None, None, bound, "no C++ compiler is found, so torch.compile cannot work here")
    eager = subject.gradients(subject.loader(4))
    return compare(name, subject.gradients(subject.loader(4), compile=True), eager, bound)


def make_examples(num: int = 20, seed: int = 0) -> Examples:
    """Return ragged random examples; of each, the first tokens are a prompt that is not learned."""
    random = np.random.default_rng(seed)
    examples = []
    for length in random.integers(4, ROW_LEN, num):
        ids = random.integers(1, VOCAB_SIZE, length).tolist()
        prompt = int(random.integers(1, length - 1))
        examples.append((ids, [False] * prompt + [True] * (int(length) - prompt)))
    return examples


def _toy_llama(base: Path | None, **shape: Any) -> LlamaConfig:
    """Return the shape of a model folder of the Llama family made small, or a plain small one."""
    found = LlamaConfig(vocab_size=VOCAB_SIZE)
    if base is not None and (base / "config.json").is_file() and read_config(base).get("model_type") in ARCHITECTURE_OF:
        found = LlamaConfig.from_hf(read_config(base))
    small = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "max_seq_len": ROW_LEN,
    }
    heads = {"num_heads": 4, "num_kv_heads": 2 if found.num_kv_heads != found.num_heads else 4, "head_dim": 8}
    plain = {"rope_scaling": None, "num_full_layers": 0, "eos_token_id": (), "bos_token_id": None, "pad_token_id": None}
    return replace(found, **{**small, **heads, **plain, **shape})  # type: ignore[arg-type]


def stir(model: nn.Module) -> nn.Module:
    """Move every trained parameter a little, so that nothing that begins at zero hides its gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


def language_subject(loop: LoopConfig, make_model: Callable[[], nn.Module]) -> Subject:
    """Return the subject of a method that predicts the next token."""
    return Subject(
        make_model=make_model,
        make_objective=lambda: CausalLanguageModeling(max_logits=5 * VOCAB_SIZE),
        make_plain_objective=lambda: CausalLanguageModeling(max_logits=None),
        loop=loop,
        examples=make_examples(),
    )


def pretrain_subject(config: Any) -> Subject:
    """Make a pre-training recipe small."""
    tied = {} if config.shape is None else {"tie_embeddings": config.shape.tie_embeddings}
    shape = _toy_llama(config.base, **tied)
    return language_subject(config.loop, lambda: stir(init_weights(Llama(shape), 0)))


def finetune_subject(config: Any) -> Subject:
    """Make a fine-tuning recipe small, with its adapter."""
    method = config.method
    room = {"max_seq_len": ROW_LEN + TOY_SIZES["num_tokens"]}  # for virtual tokens
    shape = _toy_llama(config.base, **room)

    def make_model() -> nn.Module:
        model = init_weights(Llama(shape), 0)
        if method is not None:
            torch.manual_seed(0)
            adapt(model, _toy_method(method), load_in_4bit=config.load_in_4bit)
        return stir(model)

    subject = language_subject(config.loop, make_model)
    if not isinstance(method, AdaLoraConfig):
        return subject
    return replace(
        subject,
        make_objective=lambda: BudgetedRanks(subject.make_objective(), _toy_method(method)),
        make_plain_objective=lambda: BudgetedRanks(CausalLanguageModeling(max_logits=None), _toy_method(method)),
    )


def _toy_method(method: Any) -> Any:
    """Return a method's settings made small, and without what is random in each pass."""
    sizes = {f.name: min(getattr(method, f.name), TOY_SIZES[f.name]) for f in fields(method) if f.name in TOY_SIZES}
    return replace(method, **sizes, **({"text_ids": ()} if hasattr(method, "text_ids") else {}))
