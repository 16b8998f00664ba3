"""Models on the GPU kernels against transformers in float32: prompts, chunks, decoding, and the greedy text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_helpers import HALF
from gpu_models import SETTINGS, load_on_kernels, make_rounded, session_on_kernels
from hf_oracle import CPU, Session, Tiny, difference, prompt
from torch import Tensor

from ziphius.attention import cuda
from ziphius.attention.select import make_backend
from ziphius.checkpoint.config import YarnConfig
from ziphius.checkpoint.safetensors_source import SafetensorsSource
from ziphius.distributed import SINGLE
from ziphius.kernels.gpu import experts
from ziphius.layers import cuda_kernels
from ziphius.models.loader import load_model

PROMPT, ANSWER = 49, 5
USUAL_NOISE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of plain torch in that type: a guard of the yardstick."""
_PRODUCTS = {"flash_prefill", "gemv", "skinny_linear"}
_DEEPSEEK = _PRODUCTS | {"pair_experts", "grouped_experts", "prompt_experts", "mla_parts"}
EXPECTED_KERNELS = {"V2.5": _DEEPSEEK, "V2-Lite": _DEEPSEEK, "Llama": _PRODUCTS | {"gqa_parts"}}


@pytest.fixture(scope="module", params=list(SETTINGS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tiny(name: str, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_rounded(tmp_path_factory.mktemp("tiny"), SETTINGS[name])


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the kernels that were launched."""
    names: set[str] = set()

    def watch(module: Any, name: str) -> None:
        launch: Callable[..., Any] = getattr(module, name)

        def launch_and_tell(*args: Any, **kwargs: Any) -> Any:
            names.add(name)
            return launch(*args, **kwargs)

        monkeypatch.setattr(module, name, launch_and_tell)

    for name in ("pair_experts", "grouped_experts", "prompt_experts"):
        watch(experts, name)
    for name in ("flash_prefill", "mla_parts", "gqa_parts"):
        watch(cuda, name)
    for name in ("gemv", "skinny_linear"):
        watch(cuda_kernels, name)
    return names


def play(session: Session, ids: list[int], answer: list[int]) -> tuple[Tensor, Tensor]:
    """`ids` whole and in chunks over what is cached, then both decoded -> each one's logits [tokens, vocab].

    The chunks come beside a decode row where there is one, and are small enough for the grouped kernels or large
    enough for the prompt kernels; one sequence alone is decoded by the matrix-vector kernels.
    """
    whole = [session.step(("whole", ids))["whole"]]
    chunks = [session.step(("chunks", ids[:2]))["chunks"], session.step(("chunks", ids[2:3]))["chunks"]]
    step = session.step(("whole", answer[:1]), ("chunks", ids[3:8]))
    whole.append(step["whole"])
    chunks += [step["chunks"], session.step(("chunks", ids[8:]))["chunks"]]
    whole.append(session.step(("whole", answer[1:2]))["whole"])
    for i, token in enumerate(answer[2:]):
        step = session.step(("chunks", [answer[i]]), ("whole", [token]))
        whole.append(step["whole"])
        chunks.append(step["chunks"])
    return torch.cat(whole), torch.cat(chunks)


def errors(actual: Iterable[Tensor], expected: Tensor) -> Tensor:
    """Of each token: the norm of its logits' difference over their norm."""
    return torch.cat([(a - e).norm(dim=1) / e.norm(dim=1) for a in actual for e in [expected[: len(a)]]])


def plain_in_half(tiny: Tiny) -> Session:
    """The same model in plain torch: what HALF costs by itself."""
    model = load_model(tiny.config, SafetensorsSource(tiny.folder), SINGLE, "dtype", HALF, CPU)
    return Session(model, dtype=HALF)


def within_noise(actual: Tensor, plain: Tensor) -> bool:
    """Quantiles, because near ties between experts may fall elsewhere: that token is far off, and rightly so."""
    at = torch.tensor([0.5, 0.8])
    return bool((actual.quantile(at) < 1.3 * plain.quantile(at)).all())


def test_float32(tiny: Tiny, name: str, device: torch.device, used: set[str]) -> None:
    """The same logits; and, token by token, the text of transformers and of our own CPU path."""
    ids = prompt(PROMPT)
    answer = tiny.greedy(ids, ANSWER)
    assert len(set(answer)) > 3, "a text that repeats one token tells little"
    session = session_on_kernels(load_on_kernels(tiny, torch.float32, device), torch.float32, device)
    whole, chunks = play(session, ids, answer)
    expected = tiny.logits(ids + answer)
    assert difference(whole, expected) < 2e-5
    assert difference(chunks, expected[: len(chunks)]) < 2e-5
    assert [int(row.argmax()) for row in whole[PROMPT - 1 : -1]] == answer
    assert used == EXPECTED_KERNELS[name]

    on_cpu = Session(tiny.load(), backend=make_backend(CPU))
    logits = [on_cpu.step(("a", ids))["a"][-1]]
    for _ in answer[1:]:
        logits.append(on_cpu.step(("a", [int(logits[-1].argmax())]))["a"][-1])
    assert [int(row.argmax()) for row in logits] == answer


def test_half(tiny: Tiny, name: str, device: torch.device, used: set[str]) -> None:
    """As near as plain torch in the same type is."""
    if name == "V2-Lite" and device.type != "cuda":
        pytest.skip("what it has of its own is in test_float32, and the interpreter takes long")
    ids = prompt(PROMPT)
    answer = tiny.greedy(ids, ANSWER)
    expected = tiny.logits(ids + answer)
    plain = errors(play(plain_in_half(tiny), ids, answer), expected)
    assert plain.median() < USUAL_NOISE[HALF]
    session = session_on_kernels(load_on_kernels(tiny, HALF, device), HALF, device)
    assert within_noise(errors(play(session, ids, answer), expected), plain)
    assert used == EXPECTED_KERNELS[name]


def test_a_wrong_scale_is_more_than_noise(tmp_path: Path, device: torch.device) -> None:
    tiny, ids = make_rounded(tmp_path, SETTINGS["V2.5"]), prompt(20)
    rope = tiny.config.rope_scaling
    assert isinstance(rope, YarnConfig)
    wrong = replace(tiny.config, rope_scaling=replace(rope, mscale_all_dim=0.9))
    plain = errors([plain_in_half(tiny).step(("a", ids))["a"]], tiny.logits(ids))
    for dtype in (torch.float32, HALF):
        session = session_on_kernels(load_on_kernels(tiny, dtype, device, config=wrong), dtype, device)
        actual = session.step(("a", ids))["a"]
        assert difference(actual, tiny.logits(ids)) > 1e-3
        assert not within_noise(errors([actual], tiny.logits(ids)), plain)
