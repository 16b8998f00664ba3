"""The real default model in float32 through the whole engine, against transformers on the same weights."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ziphius.checkpoint.gguf import GGUFSource
from ziphius.engine.loading import LoadedRank
from ziphius.ipc.messages import AddRequest
from ziphius.tokenizer.tokenizer import Tokenizer

Add = Callable[..., AddRequest]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path, load: Callable[..., LoadedRank]) -> LoadedRank:
    return load(smollm2_path, page_size=16)


@pytest.fixture(scope="module")
def tokenizer(smollm2: LoadedRank) -> Tokenizer:
    assert smollm2.checkpoint.tokenizer is not None
    return Tokenizer.from_files(smollm2.checkpoint.tokenizer)


@pytest.fixture(scope="module")
def oracle(smollm2: LoadedRank) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = smollm2.checkpoint.config
    settings = {
        name: getattr(config, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "max_position_embeddings",
            "tie_word_embeddings",
        )
    }
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    model = LlamaForCausalLM(LlamaConfig(**settings, rope_parameters=rope))
    weights = {name: torch.from_numpy(array) for name, array in GGUFSource.open(smollm2.checkpoint.path).tensors()}
    model.load_state_dict(weights, strict=False)
    return model.eval()


def ask(tokenizer: Tokenizer) -> list[int]:
    assert tokenizer.chat is not None
    return tokenizer.encode(tokenizer.chat.render(QUESTION), add_special_tokens=False)


def test_it_knows_the_capital_of_france(
    smollm2: LoadedRank, tokenizer: Tokenizer, drive: Callable[..., Any], add: Add
) -> None:
    answer = drive(smollm2).run([add("a", ask(tokenizer), max_new_tokens=20, ignore_eos=False)])["a"]
    assert tokenizer.decode(answer.token_ids) == "The capital of France is Paris."
    assert answer.finish.kind == "stop"


@torch.inference_mode()
def test_it_agrees_with_transformers(
    smollm2: LoadedRank, tokenizer: Tokenizer, oracle: Any, drive: Callable[..., Any], add: Add
) -> None:
    """64 greedy tokens, and every log-probability of prompt and answer, in chunks and in company."""
    text = "Once upon a time there was a whale that could dive deeper than any other. One day it"
    ids = tokenizer.encode(text)
    driver = drive(smollm2, chunked_prefill_size=7)
    answer = driver.run(
        [
            add("story", ids, max_new_tokens=64, logprobs=True, prompt_logprobs_from=1),
            add("company", ask(tokenizer), max_new_tokens=20),
        ]
    )["story"]
    logits = oracle(torch.tensor([ids + answer.token_ids])).logits[0]
    assert answer.token_ids == logits[len(ids) - 1 : -1].argmax(dim=-1).tolist()
    wanted = torch.log_softmax(logits, dim=-1)[:-1].gather(1, torch.tensor([ids + answer.token_ids])[0, 1:, None])
    told = torch.tensor([one.logprob for one in answer.prompt_logprobs + answer.logprobs])
    scale = float(logits.abs().max())
    assert float((told - wanted[:, 0]).abs().max()) < 1e-4 * scale


@pytest.mark.usefixtures("smollm2_path")
def test_the_readmes_python_example() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
