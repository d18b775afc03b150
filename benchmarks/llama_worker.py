"""llama.cpp behind a pipe: the rival of serve.py, run by the interpreter that has llama-cpp-python.

Reads one JSON object a line, does what it says, answers with one line. The C interface is driven directly, so nothing
of the Python wrapper's own work is counted: greedy tokens by NumPy's argmax over the logits that llama_decode leaves.
Users that share a prompt share its cells (llama_memory_seq_cp in one unified cache) and are decoded in one batch.
"""

import ctypes
import json
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np


class Rival:
    """One model and one context of llama.cpp."""

    def __init__(self, path: str, num_threads: int, context: int, num_sequences: int, clock: str):
        self.clock = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self._silent = silent  # kept: C calls it
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, 2048, 512
        params.n_seq_max, params.n_threads, params.n_threads_batch = num_sequences, num_threads, num_threads
        params.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.loaded: dict[str, object] = {}  # adapters by path
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(2048, 0, num_sequences)

    def clear(self) -> None:
        """Forget everything computed so far."""
        llama_cpp.llama_memory_clear(self.memory, True)

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, wanted) and return the likeliest token after each wanted one."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, is_wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, is_wanted
        assert llama_cpp.llama_decode(self.context, batch) == 0
        found = []
        for i, (_, _, _, is_wanted) in enumerate(tokens):
            if is_wanted:
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, i), (self.vocab_size,))
                found.append(int(logits.argmax()))
        return found

    def prefill(self, ids: list[int], sequence: int = 0, start: int = 0) -> int:
        """Compute a prompt in one batch and return the token after it."""
        last = len(ids) - 1
        return self.decode([(t, start + i, sequence, i == last) for i, t in enumerate(ids)])[0]

    def single(self, prompt: list[int], num_tokens: int) -> dict[str, float]:
        """One user: seconds of the prompt and of the tokens after it."""
        self.clear()
        start = self.clock()
        token = self.prefill(prompt)
        middle = self.clock()
        for i in range(num_tokens - 1):
            token = self.decode([(token, len(prompt) + i, 0, True)])[0]
        return {"prefill": middle - start, "decode": self.clock() - middle}

    def users(self, shared: list[int], own: list[list[int]], num_tokens: int, one_by_one: bool) -> dict[str, float]:
        """Users who share a beginning: together in one batch, or one after the other as its Python server does."""
        self.clear()
        start = self.clock()
        self.decode([(t, i, 0, False) for i, t in enumerate(shared)])
        if one_by_one:
            for ids in own:
                llama_cpp.llama_memory_seq_rm(self.memory, 0, len(shared), -1)
                token = self.prefill(ids, 0, len(shared))
                for i in range(num_tokens - 1):
                    token = self.decode([(token, len(shared) + len(ids) + i, 0, True)])[0]
            return {"seconds": self.clock() - start}
        for sequence in range(1, len(own)):
            llama_cpp.llama_memory_seq_cp(self.memory, 0, sequence, 0, -1)
        rows = [(t, len(shared) + i, s, i == len(ids) - 1) for s, ids in enumerate(own) for i, t in enumerate(ids)]
        tokens = self.decode(rows)
        at = [len(shared) + len(ids) for ids in own]
        middle = self.clock()
        for step in range(num_tokens - 1):
            tokens = self.decode([(t, at[s] + step, s, True) for s, t in enumerate(tokens)])
        return {"seconds": self.clock() - start, "decode": self.clock() - middle}

    def adapters(self, paths: list[str], prompts: list[list[int]], num_tokens: int, num_each: int) -> dict[str, float]:
        """Users of several adapters: it computes one adapter at a time, so each one's users wait for those before."""
        loaded = self.loaded
        for path in paths:
            if path not in loaded:
                loaded[path] = llama_cpp.llama_adapter_lora_init(self.model, path.encode())
                assert loaded[path], path
        start = self.clock()
        for index, path in enumerate(paths):
            self.use(loaded[path])
            self.clear()
            own = prompts[index * num_each : (index + 1) * num_each]
            rows = [(t, i, s, i == len(ids) - 1) for s, ids in enumerate(own) for i, t in enumerate(ids)]
            tokens = self.decode(rows)
            for step in range(num_tokens - 1):
                tokens = self.decode([(t, len(own[s]) + step, s, True) for s, t in enumerate(tokens)])
        seconds = self.clock() - start
        self.use(None)
        return {"seconds": seconds}

    def use(self, adapter: object | None) -> None:
        """Compute with one adapter, or with none."""
        kept = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter) if adapter is not None else None
        scales = (ctypes.c_float * 1)(1.0)
        num = 0 if adapter is None else 1
        assert llama_cpp.llama_set_adapters_lora(self.context, kept, num, scales) == 0


def quantize(source: str, target: str) -> None:
    """Round a GGUF file to Q4_0 as llama.cpp does it."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    assert llama_cpp.llama_model_quantize(source.encode(), target.encode(), params) == 0


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    source = settings.pop("source")
    if not Path(settings["path"]).is_file():
        quantize(source, settings["path"])
    rival = Rival(**settings)
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(rival, order.pop("do"))(**order)), flush=True)


if __name__ == "__main__":
    main()
