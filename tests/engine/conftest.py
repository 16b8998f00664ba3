"""Tiny random checkpoints with transformers beside them, and an engine driven to the end in this process.

Helpers lie beside this file; tests import them by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ziphius.checkpoint.checkpoint import open_checkpoint
from ziphius.config import ServeConfig
from ziphius.engine.channel import MemoryChannel
from ziphius.engine.engine import Engine
from ziphius.engine.loading import LoadedRank, load_rank
from ziphius.ipc.messages import (
    AddRequest,
    Finish,
    FromEngine,
    RequestOutput,
    SamplingParams,
    StepOutput,
    ToEngine,
    TokenLogprob,
)

sys.path.insert(0, str(Path(__file__).parent))

LLAMA: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
DEEPSEEK_V2: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": False,
    "max_position_embeddings": 1280,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


@dataclass
class Tiny:
    """A checkpoint on disk, and what transformers makes of it."""

    folder: Path
    oracle: Any

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        """[tokens, vocab] of a whole sequence."""
        logits: Tensor = self.oracle(torch.tensor([ids])).logits[0]
        return logits

    @torch.inference_mode()
    def generate(self, ids: list[int], count: int, **options: Any) -> list[int]:
        """Greedy answer of transformers' own generate, end tokens ignored."""
        settings = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0} | options
        answer = self.oracle.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **settings)
        return list(answer[0, len(ids) :].tolist())


@dataclass
class Answer:
    """Everything that was said about one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    cached_tokens: int = 0
    preemptions: int = 0
    finish: Finish | None = None

    def take(self, output: RequestOutput) -> None:
        assert self.finish is None, "news after the last"
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.cached_tokens, self.preemptions = output.cached_tokens, output.preemptions
        self.finish = output.finish


class Driver:
    """An engine in this thread, and the answers so far."""

    def __init__(self, engine: Engine, channel: MemoryChannel) -> None:
        self.engine = engine
        self.channel = channel
        self.answers: dict[str, Answer] = {}
        self.others: list[FromEngine] = []

    def send(self, *messages: ToEngine) -> None:
        for message in messages:
            if isinstance(message, AddRequest):
                self.answers[message.rid] = Answer()
            self.channel.to_engine.append(message)

    def turn(self) -> None:
        self.engine.turn()
        self.read()

    def read(self) -> None:
        while self.channel.from_engine:
            message = self.channel.from_engine.popleft()
            if isinstance(message, StepOutput):
                for output in message.outputs:
                    self.answers[output.rid].take(output)
            else:
                self.others.append(message)

    def finish(self) -> dict[str, Answer]:
        """Until nothing is left to do."""
        self.turn()
        while not self.engine.idle:
            self.turn()
        self.read()
        return self.answers

    def run(self, requests: Iterable[AddRequest]) -> dict[str, Answer]:
        self.send(*requests)
        return self.finish()


def add_request(rid: str, prompt_ids: list[int], **sampling: Any) -> AddRequest:
    """A request, greedy and not ended by an end token unless said otherwise."""
    settings: dict[str, Any] = {"max_new_tokens": 16, "temperature": 0.0, "seed": 0, "ignore_eos": True} | sampling
    return AddRequest(rid=rid, prompt_ids=prompt_ids, sampling=SamplingParams(**settings))


def config_of(folder: Path, **options: Any) -> ServeConfig:
    settings: dict[str, Any] = {
        "model": str(folder),
        "dtype": "float32",
        "max_total_tokens": 4096,
        "page_size": 4,
        "device": "cpu",
    }
    return ServeConfig(**(settings | options))


def load_tiny(folder: Path, **options: Any) -> LoadedRank:
    """Loaded for real, in float32, with a cache of 4096 tokens in pages of 4."""
    return load_rank(config_of(folder, **options), open_checkpoint(str(folder), folder), lambda progress: None)


def drive_engine(
    loaded: LoadedRank, *, overlap: bool = False, num_pages: int | None = None, runner: Any = None, **options: Any
) -> Driver:
    """A fresh engine over `loaded`; `options` change its config as far as the scheduler reads it."""
    channel = MemoryChannel()
    changed = replace(loaded, config=replace(loaded.config, **options), num_pages=num_pages or loaded.num_pages)
    return Driver(Engine(changed.make_scheduler(), runner or loaded.runner, channel, overlap=overlap), channel)


def make_tiny(folder: Path, settings: dict[str, Any]) -> Tiny:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    if "kv_lora_rank" in settings:
        oracle: Any = DeepseekV2ForCausalLM(DeepseekV2Config(**settings))
    else:
        oracle = LlamaForCausalLM(LlamaConfig(**settings))
    oracle.eval().save_pretrained(folder)
    return Tiny(folder, oracle)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("llama"), LLAMA)


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("deepseek"), DEEPSEEK_V2)


@pytest.fixture(scope="session", params=["llama", "deepseek"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """Each architecture in turn."""
    made: Tiny = request.getfixturevalue(request.param)
    return made


@pytest.fixture(scope="session")
def loaded(tiny: Tiny) -> LoadedRank:
    return load_tiny(tiny.folder)


@pytest.fixture(scope="session")
def loaded_llama(llama: Tiny) -> LoadedRank:
    return load_tiny(llama.folder)


@pytest.fixture(scope="session")
def add() -> Callable[..., AddRequest]:
    return add_request


@pytest.fixture(scope="session")
def load() -> Callable[..., LoadedRank]:
    return load_tiny


@pytest.fixture(scope="session")
def drive() -> Callable[..., Driver]:
    return drive_engine


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and threads lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
