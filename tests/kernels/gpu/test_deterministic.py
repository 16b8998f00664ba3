"""--deterministic: a sequence's bits, whatever runs beside it, however it is cut, cached, preempted or replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from gpu_engine import Answer, Settings, answers
from gpu_helpers import HALF
from gpu_models import SETTINGS, load_on_kernels, make_rounded, session_on_kernels
from hf_oracle import Session, Tiny, prompt
from test_models import make_batch
from torch import Tensor

from ziphius.attention import cuda
from ziphius.ipc.messages import AddRequest, SamplingParams
from ziphius.kernels.gpu import tuning
from ziphius.kernels.gpu.device import GpuDevice
from ziphius.kv_cache.kv_pool import KVCache
from ziphius.layers import cuda_kernels

ON_GPU = torch.cuda.is_available()
# (model, type). HALF is what is served, but float32 shows every change of an order; and the interpreter takes long.
CASES = [(name, dtype) for name in SETTINGS for dtype in (torch.float32, HALF)]
ON_A_CPU = [("V2.5", torch.float32), ("Llama", torch.float32)]
SPLIT = 12
"""Tokens a split has in these tests."""
PROMPT, DECODED = prompt(11), [5, 17, 8]
NEW_TOKENS = 5


@dataclass(frozen=True)
class Case:
    tiny: Tiny
    dtype: torch.dtype
    device: torch.device


def cases(on_a_cpu: list[tuple[str, torch.dtype]]) -> pytest.MarkDecorator:
    some = CASES if ON_GPU else on_a_cpu
    ids = [f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in some]
    return pytest.mark.parametrize(("name", "dtype"), some, ids=ids)


@pytest.fixture(scope="module")
def make_case(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Callable[..., Case]:
    made: dict[str, Tiny] = {}

    def make(name: str, dtype: torch.dtype) -> Case:
        if name not in made:
            made[name] = make_rounded(tmp_path_factory.mktemp("tiny"), SETTINGS[name])
        return Case(made[name], dtype, device)

    return make


@pytest.fixture
def _short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short sequences have several; how many are launched depends on the longest of the batch."""
    for module in (cuda, tuning):
        monkeypatch.setattr(module, "FIXED_SPLIT", SPLIT)


@pytest.fixture(autouse=True)
def _products_know_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a tensor core's tile each sum is made alike. In the interpreter's, BLAS makes it as its place in the tile
    wants it: here every sum of a tile is made in the same order."""
    if ON_GPU:
        return
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        a_data, b_data = (operand.data.astype(d.data.dtype) for operand in (a, b))
        return interpreter.TensorHandle(np.einsum("ik,kj->ij", a_data, b_data) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def alone(session: Session) -> Tensor:
    return torch.cat([session.step(("a", ids))["a"] for ids in (PROMPT, *([token] for token in DECODED))])


def in_chunks(session: Session) -> Tensor:
    ids = PROMPT + DECODED
    return torch.cat([session.step(("a", part))["a"] for part in (ids[:3], ids[3:4], ids[4:13], ids[13:])])


def at_once(session: Session) -> Tensor:
    return session.step(("a", PROMPT))["a"]


def token_by_token(session: Session) -> Tensor:
    return torch.cat([session.step(("a", [token]))["a"] for token in PROMPT])


def in_company(session: Session) -> Tensor:
    """Beside a longer sequence and others, in front of them, behind and between; over the edge of 16 tokens."""
    long = prompt(24, 2)
    out = [session.step(("long", long[:10]), ("a", PROMPT[:5]), ("b", [3]))["a"]]
    out.append(session.step(("b", [7]), ("long", long[10:]), ("a", PROMPT[5:]))["a"])
    out.append(session.step(("b", [11]), ("a", DECODED[:1]), ("long", [1]))["a"])
    out.append(session.step(("a", DECODED[1:2]), ("long", [2, 3]))["a"])
    out.append(session.step(("b", [2]), ("a", DECODED[2:]))["a"])
    return torch.cat(out)


def played(case: Case, batch_invariant: bool, *ways: Callable[[Session], Tensor]) -> list[Tensor]:
    model = load_on_kernels(case.tiny, case.dtype, case.device, batch_invariant)
    return [way(session_on_kernels(model, case.dtype, case.device, batch_invariant)) for way in ways]


@cases(ON_A_CPU)
@pytest.mark.usefixtures("_short_splits")
def test_the_same_bits(make_case: Callable[..., Case], name: str, dtype: torch.dtype) -> None:
    case = make_case(name, dtype)
    expected, chunked, accompanied = played(case, True, alone, in_chunks, in_company)
    assert expected.isfinite().all()
    assert torch.equal(chunked, expected)
    assert torch.equal(accompanied, expected)


@cases(ON_A_CPU)
@pytest.mark.usefixtures("_short_splits")
def test_other_work_without_it(
    make_case: Callable[..., Case], name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the test above would show nothing: several tokens together are computed by other kernels than one token.

    Whether that changes a bit depends on the numbers, so the work is compared and not the bits.
    """
    case = make_case(name, dtype)
    for batch_invariant in (True, False):
        together, one_by_one = (work_of(case, batch_invariant, way, monkeypatch) for way in (at_once, token_by_token))
        assert (together == one_by_one) is batch_invariant


def work_of(
    case: Case, batch_invariant: bool, way: Callable[[Session], Tensor], monkeypatch: pytest.MonkeyPatch
) -> set[object]:
    """The kinds of work that `way` causes: how float products are cut, and how tokens attend."""
    seen: set[object] = set()

    def watch(where: Any, name: str, describe: Callable[..., object]) -> None:
        compute = getattr(where, name)

        def watched(*args: Any, **options: Any) -> Any:
            seen.add((name, describe(*args)))
            return compute(*args, **options)

        patch.setattr(where, name, watched)

    with monkeypatch.context() as patch:
        watch(cuda_kernels, "gemv", lambda *_: None)
        watch(cuda_kernels, "skinny_linear", lambda gpu, x, weight, workspace, config: config)
        watch(cuda, "flash_prefill", lambda *_: None)
        played(case, batch_invariant, way)
    return seen


def attended(device: torch.device, steps: list[list[tuple[int, int]]], qkv: list[Tensor], which: int) -> Tensor:
    """What sequence `which` of `steps` (see test_models) gets for its part of `qkv`, [tokens, heads, dim] each."""
    backend = cuda.CudaBackend(device, batch_invariant=True)
    cache = KVCache(*(torch.zeros(160, 2, 24, device=device) for _ in range(2)))
    out = []
    for step in steps:
        batch = make_batch(step, torch.zeros(64, dtype=torch.long, device=device), device)
        parts = [[torch.randn_like(x[:count]) for x in qkv] for _, count in step]
        before, count = step[which]
        parts[which] = [x[before : before + count] for x in qkv]
        q, k, v = (torch.cat(x) for x in zip(*parts, strict=True))
        backend.prepare(batch)
        first = batch.query_starts[which]
        out.append(backend.attend(q, k, v, cache, batch, 0.2)[first : first + count])
    return torch.cat(out)


def test_attention_with_ordinary_keys(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over more keys than a block has, and over two splits."""
    monkeypatch.setattr(cuda, "FIXED_SPLIT", 40)
    qkv = [torch.randn(46, heads, 24, device=device) for heads in (6, 2, 2)]
    expected = attended(device, [[(0, 46)]], qkv, 0)
    company = [[(0, 3), (0, 20)], [(3, 1), (20, 1)], [(4, 1), (21, 25)]]
    assert torch.equal(attended(device, company, qkv, 1), expected)


@pytest.mark.parametrize("name", ["unknown", "NVIDIA H200"])
def test_plans_know_no_number_of_tokens(name: str) -> None:
    """Nor the longest sequence, but for how many splits there are; measured or guessed, for shapes of V2.5 and Lite."""
    tuned = tuning.Tuned.of(GpuDevice(name, 132, True, batch_invariant=True))
    assert bool(tuned.measured) == (name != "unknown")
    plans = []
    for tokens, longest in ((1, 10), (3, 5000), (16, 70), (130, 1 << 17), (4000, 4000)):
        splits, mla = tuned.mla(tokens, 32, 512, longest, 2)
        experts = [tuned.experts(tokens, *shape) for shape in ((160, 5120, 384, 6), (64, 2048, 1408, 6))]
        plans.append((tuned.skinny(tokens, 5120, 4096), mla, splits.chunk, *experts))
        assert splits.splits * splits.chunk >= longest
    assert all(plan == plans[0] for plan in plans)


def ask(rid: str, ids: list[int], logprobs: bool) -> AddRequest:
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, seed=0, ignore_eos=True, logprobs=logprobs)
    return AddRequest(rid=rid, prompt_ids=ids, sampling=sampling)


def said(told: dict[str, Answer]) -> dict[str, tuple[list[int], list[float | None]]]:
    return {rid: (answer.token_ids, answer.logprobs) for rid, answer in told.items()}


@cases(ON_A_CPU[:1])
def test_the_engines_answers(make_case: Callable[..., Case], name: str, dtype: torch.dtype) -> None:
    """Tokens and, bit for bit, their log-probabilities: one request at a time, against everything that may differ."""
    case = make_case(name, dtype)
    model = load_on_kernels(case.tiny, dtype, case.device, batch_invariant=True)
    prompts = {"a": prompt(5), "b": prompt(4) + prompt(3, 3), "c": prompt(10, 4)}

    def run(settings: Settings, *waves: list[AddRequest]) -> dict[str, Answer]:
        return answers(model, dtype, case.device, True, settings, *waves)

    wanted = run(Settings(rows=1), [ask(rid, ids, True) for rid, ids in prompts.items()])
    assert len({tuple(answer.token_ids) for answer in wanted.values()}) == len(prompts)

    tight = Settings(pages=9, chunk=8, reserved_tokens=0)
    crowded = run(tight, [ask(rid, ids, True) for rid, ids in prompts.items()])
    assert any(answer.preemptions for answer in crowded.values())
    assert said(crowded) == said(wanted)

    graphs = Settings(prefix_cache=True, graph_sizes=(1, 4))
    first = [ask(rid, prompts[rid], True) for rid in "ac"]
    later = [ask("b", prompts["b"], False), *(ask(f"{rid} again", prompts[rid], False) for rid in "ac")]
    cached = run(graphs, first, later)
    assert all(cached[request.rid].cached_tokens >= 4 for request in later)
    assert said({rid: cached[rid] for rid in "ac"}) == said({rid: wanted[rid] for rid in "ac"})
    for rid in ("b", "a again", "c again"):
        assert cached[rid].token_ids == wanted[rid[0]].token_ids, rid
