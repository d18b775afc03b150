"""Training on one GPU: the share of its rate at 1B, GPT-2 beside a plain loop, and QLoRA of an 8B shape beside PEFT.

    python benchmarks/gpu_train.py --parts mfu gpt2 qlora --corpus TEXT --rival-python PYTHON --json FILE
    python benchmarks/gpu_train.py --tiny --json FILE                      (all parts at toy size, on a CPU too)

mfu: a Llama shape of 1.2B, rows of 2,048, bfloat16 over float32 weights, AdamW, compiled; FLOPs by the formula of
`modelwright.train.speed` over the rate that the maker states for dense bfloat16 (--peak-flops for GPUs not listed).
gpt2: the shape of GPT-2 with 124M parameters on one text; tokens/s, and seconds to a fixed validation loss, beside a
loop in the manner of nanoGPT (in this file), with the same data, batch, rates and torch.compile. Ours is GPT-2 too,
with the plain loop's AdamW and with Muon, as two rows. qlora: 8B shape, random weights rounded as they are made, rank
16 on all seven matrices, 2 x 2,048 tokens, blocks recomputed, paged 8-bit moments; beside transformers + PEFT +
bitsandbytes where --rival-python has them. Contenders are processes of their own and take turns, --rounds times.
Not run on a GPU yet, only at toy size on a CPU.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

# Dense bfloat16, FLOP/s, by the makers' data sheets; a name is looked for in the device's.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "B200": 2250e12}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY_SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 4}
BILLION = {"hidden_size": 2048, "intermediate_size": 5632, "num_layers": 24, "num_heads": 16, "num_kv_heads": 16}
EIGHT = {"hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8}
GPT2 = {"hidden_size": 768, "num_layers": 12, "num_heads": 12}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, TARGET_LOSS = 16, 4.0


def wait():
    """Let the device finish, so that a clock tells the truth."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak_bytes():
    """Return the largest size that the device's memory had since it was last asked to forget."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed_steps(step, num_steps, num_tokens, warm=3):
    """Do steps and return tokens a second by the median one, after some that warm up."""
    seconds = []
    for _ in range(warm + num_steps):
        start = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - start)
    return num_tokens / statistics.median(seconds[warm:])


def random_loader(vocab_size, num_rows, row_len):
    """Return batches of random tokens."""
    import numpy as np

    from modelwright.data.load import RowLoader
    from modelwright.data.pack import Rows

    ids = np.random.default_rng(0).integers(1, vocab_size, (4 * num_rows, row_len + 1))
    rows = Rows(ids[:, :-1].copy(), ids[:, 1:].copy())
    return RowLoader(lambda _: rows, num_rows)


def run_mfu(arguments):
    """Train the 1B shape for a few steps."""
    from modelwright.models.llama import Llama, LlamaConfig
    from modelwright.nn.init import init_weights
    from modelwright.optim.build import OptimizerConfig
    from modelwright.train.loop import LoopConfig, Run
    from modelwright.train.objective import CausalLanguageModeling
    from modelwright.train.speed import step_flops_per_token

    row_len, num_rows, vocab_size = (128, 2, 512) if arguments.tiny else (2048, arguments.rows, 32_000)
    config = LlamaConfig(vocab_size=vocab_size, max_seq_len=row_len, **(TINY_SHAPE if arguments.tiny else BILLION))
    with torch.device(DEVICE):
        model = init_weights(Llama(config), 0)
    loop = LoopConfig(
        num_steps=10_000,
        micro_batch_size=num_rows,
        precision="bf16",
        compile=not arguments.tiny,
        optimizer=OptimizerConfig("adamw"),
    )
    run = Run(model, CausalLanguageModeling(), random_loader(vocab_size, num_rows, row_len), loop)
    rate = timed_steps(run.do_step, 3 if arguments.tiny else 20, num_rows * row_len)
    flops = step_flops_per_token(model, row_len)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    peak = arguments.peak_flops or next((value for key, value in PEAK_FLOPS.items() if key in name), None)
    share = peak and rate * flops / peak  # none for a device whose rate is not known
    found = {"tokens_per_second": rate, "mfu_fraction": share, "peak_flops": peak, "device": name}
    return found | {"parameters": sum(p.numel() for p in model.parameters()), "peak_bytes": peak_bytes()}


class PlainBlock(nn.Module):
    """A block of nanoGPT: LayerNorm, causal attention, LayerNorm, GELU."""

    def __init__(self, size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x):
        """Map (B, T, D) to the same."""
        shape = (x.shape[0], x.shape[1], self.num_heads, -1)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """GPT-2 as a plain loop would write it; the loss over all logits at once."""

    def __init__(self, vocab_size, row_len, hidden_size, num_layers, num_heads):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab_size, hidden_size), nn.Embedding(row_len, hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(hidden_size, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        for name, parameter in self.named_parameters():
            std = 0.02 / math.sqrt(2 * num_layers) if name.endswith(("out.weight", "down.weight")) else 0.02
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids, labels):
        """Return the mean loss."""
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def gpt2_sizes(arguments):
    """Return shape, row length, rows a step, steps, and the steps between two evaluations."""
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 2} if arguments.tiny else GPT2
    return (shape, 64, 4, 6, 3) if arguments.tiny else (shape, 1024, 32, arguments.steps, 25)


def factor_at(step, num_steps):
    """Return the schedule of both sides: a rise over 5 % of the steps, then a cosine."""
    warm = max(1, num_steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, num_steps - warm)))


def run_plain(arguments):
    """Train GPT-2 by the plain loop."""
    shape, row_len, num_rows, num_steps, every = gpt2_sizes(arguments)
    data = torch.load(arguments.folder / "corpus.pt")
    torch.manual_seed(arguments.seed)
    model = PlainGPT(data["vocab_size"], row_len, **shape).to(DEVICE)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    rule = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    called = model if arguments.tiny else torch.compile(model)
    order = torch.randperm(len(data["train"]), generator=torch.Generator().manual_seed(arguments.seed))

    def step(number):
        picked = order[torch.arange(number * num_rows, (number + 1) * num_rows) % len(order)]
        rows = data["train"][picked].to(DEVICE)
        for group in rule.param_groups:
            group["lr"] = 6e-4 * factor_at(number, num_steps)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = called(rows[:, :-1], rows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        rule.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate():
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            losses = [model(rows[:, :-1], rows[:, 1:]) for rows in data["validation"].to(DEVICE).split(num_rows)]
        return float(torch.stack(losses).mean())

    return race(step, evaluate, (num_steps, every, num_rows * row_len), arguments)


def run_gpt2(arguments, rule):
    """Train GPT-2 by our loop."""
    import numpy as np

    from modelwright.data.load import RowLoader, repeat_rows
    from modelwright.data.pack import Rows
    from modelwright.models.gpt2 import GPT2, GPT2Config
    from modelwright.nn.init import init_weights
    from modelwright.optim.build import AdamWConfig, OptimizerConfig
    from modelwright.optim.schedule import ScheduleConfig
    from modelwright.train.finetune import mean_loss
    from modelwright.train.loop import LoopConfig, Run
    from modelwright.train.objective import CausalLanguageModeling

    shape, row_len, num_rows, num_steps, every = gpt2_sizes(arguments)
    data = torch.load(arguments.folder / "corpus.pt")
    parts = {name: data[name].numpy() for name in ("train", "validation")}
    rows = {name: Rows(np.ascontiguousarray(p[:, :-1]), np.ascontiguousarray(p[:, 1:])) for name, p in parts.items()}
    with torch.device(DEVICE):
        config = GPT2Config(vocab_size=data["vocab_size"], max_seq_len=row_len, **shape)
        model = init_weights(GPT2(config), arguments.seed)
    optimizer = OptimizerConfig("adamw", adamw=AdamWConfig(6e-4)) if rule == "adamw" else OptimizerConfig("muon")
    loop = LoopConfig(
        num_steps=num_steps,
        micro_batch_size=num_rows,
        precision="bf16",
        compile=not arguments.tiny,
        seed=arguments.seed,
        optimizer=optimizer,
        schedule=ScheduleConfig("cosine", warmup_steps=max(1, num_steps // 20)),
    )
    loader = RowLoader(repeat_rows(rows["train"], arguments.seed), num_rows)
    run = Run(model, CausalLanguageModeling(), loader, loop)

    def evaluate():
        with run.autocast():
            on_device = Rows(rows["validation"].input_ids, rows["validation"].labels)
            return device_loss(run, on_device, num_rows) if DEVICE == "cuda" else mean_loss(run.model, on_device)

    return race(lambda _: run.do_step(), evaluate, (num_steps, every, num_rows * row_len), arguments)


@torch.no_grad()
def device_loss(run, rows, num_rows):
    """Return the mean loss of rows on the run's device."""
    from modelwright.data.load import RowLoader

    loader, total, count = RowLoader(lambda _: rows, num_rows), 0.0, 0
    run.model.eval()
    for _ in range(max(1, len(rows) // num_rows)):
        batch = loader.next_batch().to(run.device)
        total += float(run.objective.loss(run.model, batch))
        count += run.objective.count_trained(batch)
    run.model.train()
    return total / count


def race(step, evaluate, sizes, arguments):
    """Do steps; return tokens/s, and when the validation loss was reached; evaluations do not count as time."""
    num_steps, every, num_tokens = sizes
    seconds, curve, reached = [], [], None
    for number in range(num_steps):
        start = time.perf_counter()
        step(number)
        wait()
        seconds.append(time.perf_counter() - start)
        if (number + 1) % every == 0 or number + 1 == num_steps:
            loss, spent = evaluate(), sum(seconds)
            curve.append((number + 1, spent, loss))
            if reached is None and loss <= arguments.target_loss:
                reached = spent
    figures = {"tokens_per_second": num_tokens / statistics.median(seconds[min(5, num_steps - 1) :])}
    return figures | {"seconds_to_loss": reached, "curve": curve, "peak_bytes": peak_bytes()}


def write_corpus(arguments, folder):
    """Cut one text into rows of tokens, the last twentieth held out."""
    import gzip

    from modelwright.tokenizer.train import train_bpe

    file = arguments.corpus
    if file is None:  # always there: the interpreter's own library
        text = "\n".join(p.read_text("utf-8", "replace") for p in sorted(Path(json.__file__).parents[1].glob("*.py")))
    else:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8", "replace")
    if arguments.tiny:
        text = text[:60_000]
    tokenizer = train_bpe([text], 512 if arguments.tiny else 16_384)
    row_len = gpt2_sizes(arguments)[1]
    ids = torch.tensor(tokenizer.encode(text))
    rows = ids[: len(ids) // (row_len + 1) * (row_len + 1)].view(-1, row_len + 1)
    held_out = max(4, len(rows) // 20)
    vocab_size = -(-tokenizer.vocab_size // 64) * 64
    torch.save(
        {"train": rows[:-held_out], "validation": rows[-held_out:], "vocab_size": vocab_size}, folder / "corpus.pt"
    )


def qlora_sizes(arguments):
    """Return shape, vocabulary, rows and their length."""
    return (TINY_SHAPE, 512, 2, 128) if arguments.tiny else (EIGHT, 128_256, 2, 2048)


def run_qlora(arguments):
    """Make the 8B shape in 4 bits, layer by layer, and train an adapter on it."""
    from modelwright.models.llama import Llama, LlamaConfig
    from modelwright.nn.adapters import attach_adapter
    from modelwright.nn.linear import linears, replace_module
    from modelwright.nn.lora import LoraConfig
    from modelwright.nn.nf4 import NF4Linear
    from modelwright.train.fast import TrainerConfig
    from modelwright.train.loop import Run
    from modelwright.train.objective import CausalLanguageModeling

    shape, vocab_size, num_rows, row_len = qlora_sizes(arguments)
    with torch.device("meta"):
        model = Llama(LlamaConfig(vocab_size=vocab_size, max_seq_len=row_len, **shape)).to(torch.bfloat16)
    for name, layer in list(linears(model)):
        if name != "lm_head":
            made = nn.Linear(layer.in_features, layer.out_features, bias=False, device=DEVICE, dtype=torch.bfloat16)
            nn.init.normal_(made.weight, std=0.02)
            replace_module(model, name, NF4Linear.from_linear(made))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                made = torch.empty_like(parameter, device=DEVICE)
                nn.init.normal_(made, std=0.02) if made.ndim > 1 else nn.init.ones_(made)
                setattr(module, name, nn.Parameter(made, requires_grad=False))
    for module in model.modules():  # tables of rotations and the like
        if hasattr(module, "reset_buffers"):
            module.reset_buffers(torch.device(DEVICE))
    attach_adapter(model, LoraConfig(tuple(t.removesuffix("_proj") for t in TARGETS), rank=RANK))
    loop = TrainerConfig(num_steps=1000, micro_batch_size=num_rows, grad_accum_steps=1).loop()
    loader = random_loader(vocab_size, num_rows, row_len)
    run = Run(model, CausalLanguageModeling(), loader, loop)
    return qlora_figures(run.do_step, num_rows * row_len, arguments)


def run_peft(arguments):
    """Do the same with transformers, PEFT and bitsandbytes."""
    import bitsandbytes
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    shape, vocab_size, num_rows, row_len = qlora_sizes(arguments)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape.get("num_kv_heads", shape["num_heads"]),
        max_position_embeddings=row_len,
    )
    folder = arguments.folder / "theirs"
    if not folder.is_dir():  # 16 GB once: bitsandbytes rounds while it loads
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(DEVICE):
            LlamaForCausalLM(config).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four, dtype=torch.bfloat16)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM"))
    rule = bitsandbytes.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    ids = torch.randint(1, vocab_size, (num_rows, row_len), device=DEVICE)

    def step():
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        rule.step()
        rule.zero_grad(set_to_none=True)

    return qlora_figures(step, num_rows * row_len, arguments)


def qlora_figures(step, num_tokens, arguments):
    """Return speed and the peak of the steps alone; what making the weights took is told apart."""
    made = peak_bytes()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    rate = timed_steps(step, 3 if arguments.tiny else 10, num_tokens)
    return {"tokens_per_second": rate, "peak_bytes": peak_bytes(), "making_peak_bytes": made}


WORK = {
    "mfu": run_mfu,
    "gpt2": lambda arguments: run_gpt2(arguments, "adamw"),
    "gpt2_muon": lambda arguments: run_gpt2(arguments, "muon"),
    "plain": run_plain,
    "qlora": run_qlora,
    "peft": run_peft,
}
PARTS = {"mfu": ("mfu",), "gpt2": ("gpt2", "gpt2_muon", "plain"), "qlora": ("qlora", "peft")}


def measure(arguments, folder):
    """Let the contenders of each part take turns; return what each measured, by round."""
    found = {}
    if "gpt2" in arguments.parts:
        write_corpus(arguments, folder)
    for part in arguments.parts:
        names = [name for name in PARTS[part] if name != "peft" or arguments.rival_python is not None]
        for number in range(arguments.rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                python = arguments.rival_python if name == "peft" else sys.executable
                command = [str(python), __file__, "--work", name, "--folder", str(folder), "--seed", str(number)]
                command += [*(["--tiny"] if arguments.tiny else []), "--steps", str(arguments.steps)]
                command += ["--target-loss", str(arguments.target_loss), "--rows", str(arguments.rows)]
                command += ["--peak-flops", str(arguments.peak_flops)] if arguments.peak_flops else []
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
                found.setdefault(name, []).append(json.loads(done.stdout.rpartition("FIGURES ")[2]))
                print(f"  {name}, round {number}: {found[name][-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
    return found


def row(name, ours, rival, rival_name, unit):
    """Return one comparison of lists of figures, round by round."""
    ratios = [a / b for a, b in zip(ours, rival, strict=True)]
    figures = {"ours": statistics.median(ours), "rival": statistics.median(rival), "rival_name": rival_name}
    return {"name": name, **figures, "ratio": statistics.median(ratios), "unit": unit, "runs": len(ratios)}


def rows_of(found, arguments):
    """Turn figures into rows."""

    def get(name, key):
        return [one[key] for one in found[name]]

    rows = []
    share = [one for one in get("mfu", "mfu_fraction") if one is not None] if "mfu" in found else []
    if share:
        rows.append(row("1B shape, T = 2048, bf16: MFU", share, [0.5] * len(share), "the bound asked for", "fraction"))
    for name in ("gpt2", "gpt2_muon"):
        if name in found:
            mine, plain = (get(one, "tokens_per_second") for one in (name, "plain"))
            rows.append(row(f"{name}, 124M shape", mine, plain, "a loop like nanoGPT's", "tokens/s"))
            both = list(zip(get(name, "seconds_to_loss"), get("plain", "seconds_to_loss"), strict=True))
            reached = [pair for pair in both if None not in pair]
            if reached:
                title = f"{name}, seconds to a validation loss of {arguments.target_loss}"
                rows.append(row(title, *map(list, zip(*reached, strict=True)), "a loop like nanoGPT's", "seconds"))
    if "qlora" in found:
        peak = get("qlora", "peak_bytes")
        name, bound = "QLoRA, 8B shape, 2 x 2,048: peak of a step", [8 * 2**30] * len(peak)
        rows.append(row(name, peak, bound, "the bound asked for", "bytes"))
    if "peft" in found:
        theirs = "transformers + PEFT + bitsandbytes"
        for key, unit in (("tokens_per_second", "tokens/s"), ("peak_bytes", "bytes")):
            rows.append(row(f"QLoRA, 8B shape: {key}", get("qlora", key), get("peft", key), theirs, unit))
    return rows


def main():
    """Measure in processes of their own, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8, help="of the 1B shape, a step")
    parser.add_argument("--steps", type=int, default=1500, help="of GPT-2")
    parser.add_argument("--target-loss", type=float, default=TARGET_LOSS, help="of GPT-2 on the text held out")
    parser.add_argument("--corpus", type=Path, help="a text, plain or .gz; none: the interpreter's own library")
    parser.add_argument("--peak-flops", type=float, help="of the GPU, dense bfloat16, when its name is not known here")
    parser.add_argument("--rival-python", type=Path, help="a Python with transformers, PEFT and bitsandbytes")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on a CPU too: to see that all works")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", choices=list(WORK), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not arguments.tiny:
        sys.exit("There is no GPU here. Run this on a machine with one, or with --tiny.")
    if arguments.work:
        print("FIGURES " + json.dumps(WORK[arguments.work](arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    for one in (rows := rows_of(found, arguments)):
        print(f"{one['name']}: {one['ours']:,.4g} beside {one['rival']:,.4g} {one['unit']}, ratio {one['ratio']:.2f}")
    if arguments.json:
        from modelwright.base.measured import write_result

        name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu, toy sizes"
        write_result(arguments.json, {"device": name, "rows": rows, "runs": found}, ("torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
