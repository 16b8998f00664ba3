"""Perplexity of a model in several weight formats on a fixed text: what rounding the weights costs; it tunes nothing.

    python benchmarks/perplexity.py --formats fp32 int8

The text (data/alice.txt) is chapters I and II of Lewis Carroll's "Alice's Adventures in Wonderland", 1865, which is in
the public domain. It is cut into windows of --window tokens that know nothing of each other; in each, every token but
the first is predicted. Perplexity is exp(-mean log-probability), as the engine itself reports log-probabilities.
Also prints the greedy answer to one question: a small model is easily hurt.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from ziphius import LLM
from ziphius.config import DEFAULT_MODEL
from ziphius.ipc.messages import SamplingParams

TEXT = Path(__file__).parent / "data" / "alice.txt"
QUESTION = "What is the capital of France?"


def main() -> None:
    arguments = _parse()
    text = Path(arguments.text).read_text(encoding="utf-8")
    results = []
    for weights_format in arguments.formats:
        llm = LLM(arguments.model, weights_format=weights_format, dtype="float32", context_length=arguments.context)
        perplexity, tokens = measure(llm, text, arguments.window)
        results.append({"format": weights_format, "perplexity": perplexity, "tokens": tokens, "answer": _answer(llm)})
        _print(results)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(llm: LLM, text: str, window: int) -> tuple[float, int]:
    """(perplexity, tokens predicted)."""
    if llm.tokenizer is None:
        raise SystemExit("this checkpoint has no tokenizer")
    ids = llm.tokenizer.encode(text)
    windows = [ids[start : start + window] for start in range(0, len(ids) - 1, window)]
    sampling = SamplingParams(max_new_tokens=1, temperature=0.0, seed=0, logprobs=True, prompt_logprobs_from=0)
    total, count = 0.0, 0
    for completion in llm.generate([w for w in windows if len(w) > 1], sampling):
        told = [t.logprob for t in completion.prompt_logprobs if t.logprob is not None]
        total -= sum(told)
        count += len(told)
    return math.exp(total / count), count


def _answer(llm: LLM) -> str:
    sampling = SamplingParams(max_new_tokens=32, temperature=0.0, seed=0)
    return llm.chat([{"role": "user", "content": QUESTION}], sampling).text


def _print(results: list[dict[str, object]]) -> None:
    first, last = results[0], results[-1]
    assert isinstance(first["perplexity"], float)
    assert isinstance(last["perplexity"], float)
    change = 100 * (last["perplexity"] / first["perplexity"] - 1)
    print(
        f"{last['format']:<6} perplexity {last['perplexity']:8.4f}  ({change:+.2f} % of {first['format']}, "
        f"{last['tokens']} tokens)  {QUESTION} {str(last['answer']).strip()!r}",
        flush=True,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--formats", nargs="+", default=["fp32", "int8"], metavar="FORMAT")
    parser.add_argument("--text", default=str(TEXT), help="a text file")
    parser.add_argument("--window", type=int, default=512, help="tokens that see each other")
    parser.add_argument("--context", type=int, default=2048, help="context length of the engine")
    parser.add_argument("--json", help="write the results here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
