"""Complete prompts with any model folder, many at once, repeatably.

python examples/generate.py runs/quickstart/base "The function returns" "A list is"
"""

import sys

import modelwright as mw


def main(model: str, prompts: list[str]) -> None:
    """Print one completion a prompt; the same seed gives the same words again."""
    llm = mw.LLM(model)
    params = mw.SamplingParams(temperature=0.8, top_p=0.95, max_tokens=40, seed=7, stop=("\n\n",))
    for prompt, completion in zip(prompts, llm.generate(prompts, params), strict=True):
        print(f"{prompt}{completion.text}\n  ({len(completion.token_ids)} tokens, {completion.finish_reason})")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python examples/generate.py MODEL PROMPT...")
    main(sys.argv[1], sys.argv[2:])
