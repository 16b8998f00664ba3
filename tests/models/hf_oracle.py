"""Transformers as the oracle of model maths: random tiny checkpoints, and sessions over our own model of them."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ziphius.attention.backend import AttentionBackend
from ziphius.attention.batch import ForwardBatch
from ziphius.attention.torch_reference import TorchBackend
from ziphius.checkpoint.config import ModelConfig
from ziphius.checkpoint.safetensors_source import SafetensorsSource
from ziphius.distributed import SINGLE
from ziphius.kv_cache.kv_pool import KVPool
from ziphius.models.causal_lm import CausalLM
from ziphius.models.loader import load_model

CPU = torch.device("cpu")
VOCAB = 96
POOL_PAGES = 200


@dataclass
class Tiny:
    """A checkpoint on disk and what transformers computes with it."""

    folder: Path
    oracle: Any

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_folder(self.folder)

    def load(self, config: ModelConfig | None = None) -> CausalLM:
        source = SafetensorsSource(self.folder)
        return load_model(config or self.config, source, SINGLE, "fp32", torch.float32, CPU)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        """[tokens, vocab] of a whole sequence."""
        return self.oracle(torch.tensor([ids])).logits[0]

    def greedy(self, ids: list[int], count: int) -> list[int]:
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[-count:]


def make_tiny(folder: Path, settings: dict[str, Any]) -> Tiny:
    """`settings` are of a Llama unless model_type or kv_lora_rank say otherwise."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = copy.deepcopy(settings)  # transformers writes into it
    model_type = settings.pop("model_type", "deepseek_v2" if "kv_lora_rank" in settings else "llama")
    torch.manual_seed(0)
    oracle: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            # Large enough that attention and routing matter; norms and biases away from their 1 and 0.
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.25)
    oracle.eval().save_pretrained(folder)
    return Tiny(folder, oracle)


class Session:
    """A model on `device` with a pool of `dtype` whose pages are dealt out in random order."""

    def __init__(
        self,
        model: CausalLM,
        page_size: int = 4,
        backend: AttentionBackend | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        self.model, self.page_size, self.device = model, page_size, device
        self.pool = KVPool(model.config, POOL_PAGES, page_size, dtype, device, SINGLE)
        self.backend = backend or TorchBackend()
        self.free = list(range(POOL_PAGES))
        random.Random(7).shuffle(self.free)
        self.pages: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def step(self, *parts: tuple[str, list[int]]) -> dict[str, Tensor]:
        """(sequence, its next tokens), those with one token on a cached sequence first -> every token's logits.

        They come to the CPU.
        """
        starts, slots, positions, lens = [0], [], [], []
        decodes = 0
        for name, ids in parts:
            old = self.lengths.get(name, 0)
            decodes += len(ids) == 1 and old > 0 and decodes == len(lens)
            positions += range(old, old + len(ids))
            self.lengths[name] = old + len(ids)
            pages = self.pages.setdefault(name, [])
            while len(pages) * self.page_size < self.lengths[name]:
                pages.append(self.free.pop())
            slots += [pages[p // self.page_size] * self.page_size + p % self.page_size for p in positions[starts[-1] :]]
            lens.append(self.lengths[name])
            starts.append(len(positions))
        # What lies beyond a row's pages means nothing; this number is no page at all.
        table = torch.full((len(parts), POOL_PAGES), 10**6, dtype=torch.int32)
        for row, (name, _) in enumerate(parts):
            table[row, : len(self.pages[name])] = torch.tensor(self.pages[name], dtype=torch.int32)
        tokens = [t for _, ids in parts for t in ids]
        batch = ForwardBatch(
            input_ids=torch.tensor(tokens, device=self.device),
            positions=torch.tensor(positions, device=self.device),
            slots=torch.tensor(slots, device=self.device),
            num_decodes=decodes,
            query_starts=starts,
            seq_lens=lens,
            seq_lens_device=torch.tensor(lens, dtype=torch.int32, device=self.device),
            page_table=table.to(self.device),
            page_size=self.page_size,
            sample_indices=torch.arange(len(tokens)),
        )
        with torch.inference_mode():
            self.backend.prepare(batch)
            logits = self.model.logits(self.model.forward(batch, self.pool, self.backend)).cpu()
        return {name: logits[starts[i] : starts[i + 1]] for i, (name, _) in enumerate(parts)}

    def run(self, name: str, ids: list[int], chunks: Iterable[int]) -> Tensor:
        out, start = [], 0
        for size in chunks:
            out.append(self.step((name, ids[start : start + size]))[name])
            start += size
        return torch.cat(out)


def prompt(length: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest logit."""
    return float((actual - expected).abs().max() / expected.abs().max())
