"""Perplexity of a model in several weight formats on a fixed text: what rounding the weights costs.

    python benchmarks/perplexity.py --formats fp32 int8

The text (data/alice.txt) is chapters I and II of Lewis Carroll's "Alice's Adventures in Wonderland", 1865, which is in
the public domain. It is cut into windows of --window tokens, and each window is computed alone; every token of it but
the first is predicted. Perplexity is exp(-mean log-probability), as the engine itself reports log-probabilities.
The greedy answer to one question is printed too, because rounding can easily spoil the answers of a small model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ziphius.checkpoint.checkpoint import open_configured
from ziphius.config import DEFAULT_MODEL, resolve
from ziphius.engine.channel import MemoryChannel
from ziphius.engine.loading import load_rank
from ziphius.installation import ziphius_home
from ziphius.ipc.messages import AddRequest, SamplingParams, StepOutput, TokenLogprob
from ziphius.tokenizer.tokenizer import Tokenizer

TEXT = Path(__file__).parent / "data" / "alice.txt"
QUESTION = "What is the capital of France?"


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


class Model:
    """A model in one weights format, and its engine in this process."""

    def __init__(self, name: str, weights_format: str, context: int) -> None:
        options = {"model": name, "weights_format": weights_format, "dtype": "float32", "context_length": context}
        config = resolve(options, env={}).config
        checkpoint = open_configured(config, ziphius_home(os.environ))
        if checkpoint.tokenizer is None:
            raise SystemExit("this checkpoint has no tokenizer")
        self.tokenizer = Tokenizer.from_files(checkpoint.tokenizer)
        self._channel = MemoryChannel()
        self._engine = load_rank(config, checkpoint, lambda progress: None).make_engine(self._channel)

    def run(self, prompts: Sequence[list[int]], sampling: SamplingParams) -> list[Answer]:
        """The answers to `prompts`, which are computed together, in their order."""
        answers = {str(i): Answer() for i in range(len(prompts))}
        for rid, prompt in zip(answers, prompts, strict=True):
            self._channel.to_engine.append(AddRequest(rid=rid, prompt_ids=prompt, sampling=sampling))
        self._engine.turn()
        while not self._engine.idle:
            self._engine.turn()
        while self._channel.from_engine:
            message = self._channel.from_engine.popleft()
            for output in message.outputs if isinstance(message, StepOutput) else ():
                if output.finish is not None and output.finish.kind == "error":
                    raise SystemExit(output.finish.message)
                answers[output.rid].token_ids += output.token_ids
                answers[output.rid].prompt_logprobs += output.prompt_logprobs
        return list(answers.values())


def main() -> None:
    arguments = _parse()
    text = Path(arguments.text).read_text(encoding="utf-8")
    results = []
    for weights_format in arguments.formats:
        model = Model(arguments.model, weights_format, arguments.context)
        perplexity, tokens = measure(model, text, arguments.window)
        results.append({"format": weights_format, "perplexity": perplexity, "tokens": tokens, "answer": _answer(model)})
        _print(results)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(model: Model, text: str, window: int) -> tuple[float, int]:
    """(perplexity, tokens predicted)."""
    ids = model.tokenizer.encode(text)
    windows = [ids[start : start + window] for start in range(0, len(ids) - 1, window)]
    sampling = SamplingParams(max_new_tokens=1, temperature=0.0, seed=0, logprobs=True, prompt_logprobs_from=0)
    total, count = 0.0, 0
    for answer in model.run([w for w in windows if len(w) > 1], sampling):
        told = [t.logprob for t in answer.prompt_logprobs if t.logprob is not None]
        total -= sum(told)
        count += len(told)
    return math.exp(total / count), count


def _answer(model: Model) -> str:
    tokenizer = model.tokenizer
    if tokenizer.chat is None:
        raise SystemExit("this checkpoint has no chat template")
    prompt = tokenizer.encode(tokenizer.chat.render([{"role": "user", "content": QUESTION}]), add_special_tokens=False)
    (answer,) = model.run([prompt], SamplingParams(max_new_tokens=32, temperature=0.0, seed=0))
    return tokenizer.decode(answer.token_ids)


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
