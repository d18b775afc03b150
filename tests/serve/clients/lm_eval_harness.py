"""lm-evaluation-harness over /v1/completions: ``python lm_eval_harness.py BASE_URL MODEL TOKENIZER TASK_FOLDER``.

Prints the log-likelihood of every answer and the accuracy as one line of JSON.
"""

import json
import sys

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

base_url, model, tokenizer, folder = sys.argv[1:5]
found = simple_evaluate(
    model="local-completions",
    model_args=f"model={model},base_url={base_url}/v1/completions,tokenizer={tokenizer},tokenizer_backend=huggingface,"
    "tokenized_requests=True,max_length=256,num_concurrent=1,max_retries=1",
    tasks=["rain"],
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    log_samples=True,
    bootstrap_iters=0,
)
scores = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in found["samples"]["rain"]]
print("RESULT " + json.dumps({"acc": found["results"]["rain"]["acc,none"], "scores": scores}))
