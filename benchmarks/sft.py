"""Fine-tuning an adapter on packed chats, end to end, beside TRL and PEFT: tokens a second, memory, and the loss curve.

    python benchmarks/sft.py --rival-python VENV/bin/python --rounds 2 --json PART.json
    python benchmarks/sft.py --join PART.json PART.json --json benchmarks/results/sft.json

The model is a Llama of 15M parameters (random weights, the same file for both), the data are Alpaca's instructions of
``MODELWRIGHT_DATA`` as messages, the tokenizer is trained on them here. Both load the model in bfloat16, add LoRA of
rank 16 to all seven matrices of a block, render with the same template (Alpaca's prompt), pack into rows of 512 with
each chat alone, take the loss on the answers, and do the same number of updates: 8 rows, AdamW, clipping at 1, a linear
fall, bfloat16, no recomputation. Every run is a process of its own, in turns; its time begins when its libraries are
imported and ends when the adapter is saved. A round has a seed: data order and first values differ with it, so the
spread between the rounds of one side is the noise that the two curves are compared with.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = {"hidden_size": 288, "intermediate_size": 768, "num_layers": 6, "num_heads": 6}
ROW_LEN, ROWS, RATE, RANK, WARMUP = 512, 8, 2e-3, 16, 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUM_CHATS, VOCAB_SIZE = 2_000, 8_192
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 2}


def prepare(folder, is_tiny):
    """Write the chats and the model folder that both sides read."""
    from modelwright.base.env import data_folder
    from modelwright.base.files import write_jsonl
    from modelwright.data.conversation import message_row
    from modelwright.models.llama import Llama, LlamaConfig
    from modelwright.models.weights import save_model
    from modelwright.nn.init import init_weights
    from modelwright.tokenizer.train import train_bpe
    from modelwright.train.chats import ALPACA, read_chats

    root = data_folder()
    if root is None:
        sys.exit("MODELWRIGHT_DATA is not set: the benchmark needs instruct/alpaca_5000.json.gz of it.")
    chats = read_chats(root / "instruct" / "alpaca_5000.json.gz")[: 200 if is_tiny else NUM_CHATS]
    write_jsonl(folder / "chats.jsonl", [{"messages": [message_row(m) for m in chat.messages]} for chat in chats])
    texts = [m.content for chat in chats for m in chat.messages]
    tokenizer = train_bpe(texts, 512 if is_tiny else VOCAB_SIZE).with_chat_template(ALPACA)
    shape = TINY if is_tiny else SHAPE
    config = LlamaConfig(vocab_size=tokenizer.vocab_size, max_seq_len=ROW_LEN, tie_embeddings=True, **shape)
    save_model(init_weights(Llama(config), 0), folder / "model")
    tokenizer.save(folder / "model")


def run_ours(folder, num_steps, seed):
    """Fine-tune as the ten-line program does; return times and losses."""
    import torch

    from modelwright.base.device import peak_memory_bytes
    from modelwright.train.fast import FastModel, Trainer

    start = time.perf_counter()
    torch.manual_seed(seed)
    model = FastModel.from_pretrained(folder / "model", max_seq_len=ROW_LEN, dtype=torch.bfloat16)
    model = model.with_lora(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    settings = {"micro_batch_size": ROWS, "grad_accum_steps": 1, "learning_rate": RATE, "warmup_steps": WARMUP}
    settings |= {"optimizer": "adamw", "recompute": False, "precision": "bf16", "seed": seed}
    trainer = Trainer(model, folder / "chats.jsonl", num_steps=num_steps, **settings)
    prepared = time.perf_counter()
    run = trainer.train()
    trained = time.perf_counter()
    model.save_adapter(folder / "ours")
    done = time.perf_counter()
    filled = float((trainer.rows.document_ids >= 0).mean())
    return {
        "seconds": [prepared - start, trained - prepared, done - trained],
        "num_tokens": ROWS * ROW_LEN * num_steps * filled,
        "losses": [loss for _, loss in run.losses],
        "peak_bytes": peak_memory_bytes(),
    }


def run_theirs(folder, num_steps, seed):
    """Fine-tune with TRL's SFTTrainer and PEFT's LoRA; return times and losses."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    start = time.perf_counter()
    data = load_dataset("json", data_files=str(folder / "chats.jsonl"), split="train", cache_dir=str(folder / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    config = SFTConfig(
        output_dir=str(folder / "theirs"),
        max_steps=num_steps,
        per_device_train_batch_size=ROWS,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP,
        weight_decay=0.01,
        optim="adamw_torch_fused",
        packing=True,
        max_length=ROW_LEN,
        assistant_only_loss=True,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
        include_num_input_tokens_seen="non_padding",
    )
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    prepared = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    trainer.save_model(str(folder / "theirs"))
    done = time.perf_counter()
    return {
        "seconds": [prepared - start, trained - prepared, done - trained],
        "num_tokens": float(trainer.state.num_input_tokens_seen),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "peak_bytes": int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024,
    }


def measure(arguments, folder):
    """Let both sides take turns; which begins changes from round to round."""
    rounds = []
    for number in range(arguments.rounds):
        seed = arguments.first_seed + number
        sides = [("ours", sys.executable), ("theirs", arguments.rival_python)]
        found = {"seed": seed}
        for side, python in sides if number % 2 == 0 else sides[::-1]:
            command = [str(python), __file__, "--work", side, "--folder", str(folder)]
            command += ["--steps", str(arguments.steps), "--seed", str(seed)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
            found[side] = json.loads(done.stdout.rpartition("FIGURES ")[2])
            shown = found[side]["num_tokens"] / sum(found[side]["seconds"])
            print(
                f"  seed {seed}, {side}: {shown:,.0f} tokens/s, {found[side]['seconds']}", file=sys.stderr, flush=True
            )
        rounds.append(found)
    return rounds


def rows_of(rounds):
    """Turn rounds into rows of ours beside the rival's."""
    rival = "TRL SFTTrainer + PEFT, bf16, packing"
    rates = {
        "SFT with LoRA on packed chats, end to end": lambda r: r["num_tokens"] / sum(r["seconds"]),
        "SFT with LoRA on packed chats, updates alone": lambda r: r["num_tokens"] / r["seconds"][1],
    }
    rows = []
    for name, rate in rates.items():
        ours, theirs = ([rate(r[side]) for r in rounds] for side in ("ours", "theirs"))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        figures = {"ours": statistics.median(ours), "rival": statistics.median(theirs), "rival_name": rival}
        figures |= {"ratio": statistics.median(ratios), "ratios": ratios, "unit": "tokens/s", "runs": len(ratios)}
        rows.append({"name": name, **figures})
    for name, get in (("peak memory of the process", lambda r: r["peak_bytes"]), ("loss at the end", last_loss)):
        ours, theirs = ([get(r[side]) for r in rounds] for side in ("ours", "theirs"))
        figures = {"ours": statistics.median(ours), "rival": statistics.median(theirs), "rival_name": rival}
        unit = "bytes" if "memory" in name else "nats a token, mean of the last quarter"
        figures |= {"ratio": figures["ours"] / figures["rival"], "unit": unit, "runs": len(rounds)}
        rows.append({"name": name, **figures, "all_ours": ours, "all_rival": theirs})
    return rows


def last_loss(figures):
    """Return the mean loss of the last quarter of the steps."""
    losses = figures["losses"]
    return statistics.mean(losses[-max(1, len(losses) // 4) :])


def compare_curves(rounds):
    """Return how far the mean curves are apart, and how far the rounds of one side are from each other.

    Curves are smoothed over five steps; both figures are means of the absolute difference over all steps.
    """
    curves = {side: [smooth(r[side]["losses"]) for r in rounds] for side in ("ours", "theirs")}
    mean = {side: [statistics.mean(column) for column in zip(*found, strict=True)] for side, found in curves.items()}
    apart = statistics.mean(abs(a - b) for a, b in zip(mean["ours"], mean["theirs"], strict=True))
    spreads = [
        statistics.mean(abs(a - b) for a, b in zip(one, other, strict=True))
        for found in curves.values()
        for i, one in enumerate(found)
        for other in found[:i]
    ]
    noise = statistics.mean(spreads) if spreads else None
    return {"between_means": apart, "between_rounds_of_one_side": noise, "mean_curves": mean}


def smooth(losses, window=5):
    """Return the running mean of a curve."""
    return [statistics.mean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]


def main():
    """Prepare, measure in turns, and write; or join parts; or be one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rival-python", type=Path, default=Path(sys.executable), help="a Python that has TRL and PEFT"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0, help="of the first round; the next ones count on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="a toy, to see that all works")
    parser.add_argument("--join", type=Path, nargs="+", help="results of parts, to be made one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        run = run_ours if arguments.work == "ours" else run_theirs
        print("FIGURES " + json.dumps(run(arguments.folder, arguments.steps, arguments.seed)))
        return
    if arguments.join:
        rounds = [one for part in arguments.join for one in json.loads(part.read_text())["rounds"]]
    else:
        with tempfile.TemporaryDirectory() as name:
            prepare(Path(name), arguments.tiny)
            rounds = measure(arguments, Path(name))
    rows, curves = rows_of(rounds), compare_curves(rounds)
    for row in rows:
        print(f"{row['name']}: {row['ours']:,.2f} beside {row['rival']:,.2f} {row['unit']}, ratio {row['ratio']:.2f}")
    print(f"curves: {curves['between_means']:.4f} apart; rounds of one side {curves['between_rounds_of_one_side']}")
    if arguments.json:
        from modelwright.base.measured import write_result

        settings = {"shape": SHAPE, "batch": [ROWS, ROW_LEN], "rank": RANK, "num_steps": arguments.steps}
        write_result(arguments.json, {"settings": settings, "rows": rows, "curves": curves, "rounds": rounds})


if __name__ == "__main__":
    main()
