"""Whole plans: what fits on recorded hosts, what is recommended, and what would have to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from ziphius.checkpoint.config import ModelConfig
from ziphius.checkpoint.quantization import Quantization
from ziphius.errors import ConfigError
from ziphius.planner.abilities import Abilities, abilities
from ziphius.planner.find_model import ModelSource
from ziphius.planner.hardware import Host, parse_gpus
from ziphius.planner.memory import GIB
from ziphius.planner.plan import Candidate, Plan, PlanRequest
from ziphius.planner.planner import build_plan

MakeSource = Callable[..., ModelSource]
GetHost = Callable[[str], Host]

# A version that can do everything, so that most of these tests need no change as Ziphius grows.
_ALL = frozenset({"fp32", "bf16", "fp16", "int8", "fp8", "int4"})
ABLE = Abilities(cuda=_ALL, cpu=_ALL)
# And one that computes in 16 bits on a GPU.
YOUNG = Abilities(cuda=frozenset({"bf16", "fp16"}), cpu=frozenset({"bf16", "int8"}))
FP8 = Quantization("fp8", "fp8", blocks=True)


def cell(plan: Plan, engine: str, tp: int, weights_format: str) -> Candidate:
    (found,) = (c for c in plan.candidates if (c.engine, c.tp, c.weights_format) == (engine, tp, weights_format))
    return found


def test_the_hand_written_table(v25: ModelConfig, source: MakeSource, host: GetHost) -> None:
    """TP 1 and 2 run out of memory, TP 3 breaks the vocabulary, TP 4 works: in 16 bits."""
    plan = build_plan(source(v25), host("4xh200"), PlanRequest(), ABLE)
    verdicts = {tp: cell(plan, "native", tp, "bf16").verdict for tp in (1, 2, 3, 4, 5, 6, 8, 16)}
    assert verdicts == {1: "too_big", 2: "too_big", 3: "invalid", 4: "fits", 5: "invalid", 6: "invalid",
                        8: "fits", 16: "fits"}  # fmt: skip
    assert cell(plan, "native", 8, "bf16").missing_gpus == 4
    assert cell(plan, "native", 2, "fp8").verdict == "fits"
    assert cell(plan, "native", 1, "int4").verdict == "fits"
    assert cell(plan, "native", 8, "fp8").verdict == "invalid"
    assert cell(plan, "sglang", 4, "bf16").verdict == "fits"
    assert "220.20 GiB" in cell(plan, "native", 2, "bf16").reason
    assert plan.valid_tp == (1, 2, 4, 8, 16, 32, 64, 128)
    assert plan.fits


def test_numbers_of_one_candidate(v25: ModelConfig, source: MakeSource, host: GetHost) -> None:
    four = cell(build_plan(source(v25), host("4xh200"), PlanRequest(), ABLE), "native", 4, "bf16")
    assert four.weights is not None
    assert four.loaded_bytes == four.weights.total
    assert four.kv_bytes_per_token == 69_120
    assert four.loaded_bytes + four.reserve_bytes + four.kv_bytes <= four.memory_bytes
    assert four.memory_bytes - four.loaded_bytes - four.reserve_bytes - four.kv_bytes < 16 * 69_120
    assert four.requests == pytest.approx(four.kv_tokens / 163_840, abs=0.01)
    assert four.roofline is not None
    assert [bound.batch for bound in four.roofline.decode] == [1, 8, 32, 128]


def test_one_h200_holds_the_int4_form(v25: ModelConfig, source: MakeSource, host: GetHost) -> None:
    int4 = cell(build_plan(source(v25), host("1xh200"), PlanRequest(), ABLE), "native", 1, "int4")
    assert int4.verdict == "fits"
    assert 13 < int4.kv_bytes / GIB < 18


def test_the_recommendation_is_a_command(v25: ModelConfig, source: MakeSource, host: GetHost) -> None:
    plan = build_plan(source(v25), host("4xh200"), PlanRequest(), ABLE)
    best = plan.recommendation
    assert best is not None
    assert (best.engine, best.tp, best.weights_format, best.context_length) == ("native", 4, "bf16", 163_840)
    assert best.command == "ziphius start --model /models/M --tp 4"
    assert 0.9 < best.mem_fraction < 1
    assert plan.shown == cell(plan, "native", 4, "bf16")
    assert plan.alternatives == ()
    asked = build_plan(source(v25), host("4xh200"), PlanRequest(context_length=8192, mem_fraction=0.95), ABLE)
    assert asked.recommendation is not None
    assert asked.recommendation.command.endswith("--tp 4 --context-length 8192 --mem-fraction 0.95")


def test_a_young_version_recommends_what_it_can_run(v25: ModelConfig, source: MakeSource, host: GetHost) -> None:
    plan = build_plan(source(v25), host("4xh200"), PlanRequest(weights_format="fp8"), YOUNG)
    assert cell(plan, "native", 2, "fp8").not_yet == "fp8 is planned, not in this version"
    best = plan.recommendation
    assert best is not None
    assert best.command == (
        "ziphius start --model /models/M --engine sglang --tp 4 --weights-format fp8 --mem-fraction 0.9"
    )
    int8 = build_plan(source(v25), host("8xh100"), PlanRequest(weights_format="int8"), YOUNG)
    assert cell(int8, "native", 4, "int8").not_yet == "int8 is for CPUs in this version"
    one = build_plan(source(v25), host("1xh200"), PlanRequest(), YOUNG)
    assert one.fits
    assert one.recommendation is None
    assert {a.change for a in one.alternatives} == {"fewer bits", "more GPUs"}
    assert all(a.command is None for a in one.alternatives)


def test_two_h200_are_told_of_an_fp8_checkpoint(v25: ModelConfig, source: MakeSource, host: GetHost) -> None:
    plan = build_plan(source(v25), host("2xh200"), PlanRequest(), YOUNG)
    (change,) = (a for a in plan.alternatives if a.change == "an fp8 checkpoint")
    assert change.detail.startswith("sglang, TP 2, fp8: 111.")
    assert change.command is None


def test_what_this_version_says_it_can(v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    """Whatever Ziphius can by now, a recommended command uses only options that `start` has."""
    from ziphius.config import option_fields

    flags = {"--" + option.name.replace("_", "-") for option in option_fields()}
    able = abilities()
    assert "int8" in able.cpu
    assert not {"fp8", "int4"} & (able.cpu | able.cuda)
    for name in ("1xh200", "4xh200", "cpu-only"):
        plan = build_plan(source(v2_lite), host(name), PlanRequest(engine="native", context_length=4096))
        assert plan.recommendation is not None
        words = plan.recommendation.command.split()
        assert words[:2] == ["ziphius", "start"]
        assert {word for word in words if word.startswith("--")} <= flags


def test_sglang_through_ziphius(v25: ModelConfig, source: MakeSource, host: GetHost) -> None:
    plan = build_plan(source(v25), host("4xh200"), PlanRequest(engine="sglang"), ABLE)
    assert plan.recommendation is not None
    assert plan.recommendation.command == ("ziphius start --model /models/M --engine sglang --tp 4 --mem-fraction 0.9")
    assert {c.engine for c in plan.candidates} == {"sglang"}


def test_sglang_quantizes_after_loading(v25: ModelConfig, source: MakeSource, host: GetHost) -> None:
    two = PlanRequest(engine="sglang", tp=2, weights_format="fp8")
    plan = build_plan(source(v25), host("2xh200"), two, ABLE)
    assert not plan.fits
    assert "an fp8 checkpoint would fit" in plan.candidates[0].reason
    quantized = build_plan(source(v25, quantization=FP8), host("2xh200"), two, ABLE)
    assert quantized.fits
    assert quantized.recommendation is not None
    assert "--quantization" not in quantized.recommendation.command
    eight = PlanRequest(engine="sglang", tp=8, weights_format="fp8")
    blocks = build_plan(source(v25, quantization=FP8), host("8xh100"), eight, ABLE)
    assert blocks.candidates[0].verdict == "invalid"
    whole = Quantization("fp8", "fp8", blocks=False)
    assert build_plan(source(v25, quantization=whole), host("8xh100"), eight, ABLE).fits


def test_a_quantized_checkpoint_has_one_format(v25: ModelConfig, source: MakeSource, host: GetHost) -> None:
    plan = build_plan(source(v25, quantization=FP8), host("4xh200"), PlanRequest())
    assert {c.weights_format for c in plan.candidates} == {"fp8"}
    assert cell(plan, "native", 4, "fp8").not_yet is not None
    assert plan.recommendation is not None
    # Which format it is in, SGLang reads in the checkpoint.
    assert plan.recommendation.command == "ziphius start --model /models/M --engine sglang --tp 2 --mem-fraction 0.906"
    other = build_plan(source(v25, quantization=FP8), host("4xh200"), PlanRequest(weights_format="bf16"), ABLE)
    assert not other.fits
    assert "in fp8 already" in cell(other, "sglang", 4, "bf16").reason


def test_a_dense_model_has_no_int4(llama3_8b: ModelConfig, source: MakeSource, host: GetHost) -> None:
    plan = build_plan(source(llama3_8b), host("1xh200"), PlanRequest(), ABLE)
    assert {c.weights_format for c in plan.candidates} == {"bf16", "fp8"}
    asked = build_plan(source(llama3_8b), host("1xh200"), PlanRequest(weights_format="int4"), ABLE)
    assert not asked.fits
    assert "has none" in asked.candidates[0].reason


def test_sglang_is_given_a_larger_fraction_where_its_own_is_too_small(
    v25: ModelConfig, source: MakeSource, host: GetHost
) -> None:
    eight = cell(build_plan(source(v25), host("8xh100"), PlanRequest(), ABLE), "sglang", 8, "bf16")
    assert eight.verdict == "fits"
    assert eight.mem_fraction is not None
    assert 0.818 < eight.mem_fraction < 0.93
    assert eight.requests < 1.1


@pytest.mark.parametrize("tp", [3, 5])
def test_an_invalid_size_names_a_valid_one(v25: ModelConfig, source: MakeSource, host: GetHost, tp: int) -> None:
    plan = build_plan(source(v25), host("4xh200"), PlanRequest(tp=tp), ABLE)
    assert not plan.fits
    assert plan.recommendation is None
    assert {c.verdict for c in plan.candidates} == {"invalid"}
    (other,) = plan.alternatives
    assert other.change == "another size"
    assert other.command == "ziphius start --model /models/M --tp 4"


def test_too_few_gpus_asks_for_fewer_bits_or_more_gpus(v25: ModelConfig, source: MakeSource, host: GetHost) -> None:
    plan = build_plan(source(v25), host("2xh200"), PlanRequest(weights_format="bf16"), ABLE)
    assert not plan.fits
    changes = {a.change: a for a in plan.alternatives}
    assert changes["fewer bits"].command == "ziphius start --model /models/M --tp 2 --weights-format fp8"
    assert changes["more GPUs"].detail.startswith("2 more GPUs beside 2 x NVIDIA H200")
    assert changes["more GPUs"].command is None


def test_many_small_gpus_may_be_needed(v25: ModelConfig, source: MakeSource) -> None:
    plan = build_plan(source(v25), parse_gpus("1xL40S"), PlanRequest(weights_format="bf16"), ABLE)
    (more,) = plan.alternatives
    assert more.detail.startswith("15 more GPUs")
    assert max(c.tp for c in plan.candidates) == 16


def test_a_shorter_context(v2_lite: ModelConfig, source: MakeSource) -> None:
    """32.1 GB of 16-bit weights on a 48 GB card leave room for some of 163,840 tokens in SGLang, all in ours."""
    small = parse_gpus("RTX5090")
    request = PlanRequest(engine="native", weights_format="bf16", tp=1)
    plan = build_plan(source(v2_lite), small, request, ABLE)
    assert not plan.fits  # 29.3 GiB of 30.6, and the reserve
    asked = replace(request, weights_format="fp8", mem_fraction=0.6)
    with_context = build_plan(source(v2_lite), small, replace(asked, context_length=163_840), ABLE)
    assert not with_context.fits
    (change,) = (a for a in with_context.alternatives if a.change == "shorter context")
    assert change.command is not None
    tokens = int(change.command.split("--context-length ")[1].split()[0])
    assert tokens % 1024 == 0
    assert build_plan(source(v2_lite), small, replace(asked, context_length=tokens), ABLE).fits
    # Who asks for no context gets the shorter one at once.
    without = build_plan(source(v2_lite), small, asked, ABLE)
    assert without.fits
    assert without.recommendation is not None
    assert without.recommendation.context_length == tokens
    assert without.recommendation.command == change.command


def test_a_busy_gpu(v25: ModelConfig, v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    plan = build_plan(source(v25), host("busy"), PlanRequest(tp=4, weights_format="bf16"), ABLE)
    assert not plan.fits
    changes = {a.change: a.detail for a in plan.alternatives}
    assert changes["free memory"].startswith("on GPU 2, held by python3 (pid 411); then native, TP 4, bf16")
    assert "more GPUs" not in changes
    assert any("GPU 2: 112.5" in note and "python3 (pid 411, 111.9" in note for note in plan.notes)
    two = build_plan(source(v2_lite), host("busy"), PlanRequest(tp=2), ABLE)
    assert two.shown is not None
    assert two.shown.gpus == (0, 1)


def test_gpus_that_are_not_the_first_are_named(v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    first, *others = host("busy").gpus
    from msgspec.structs import replace as changed

    busy_first = changed(host("busy"), gpus=(changed(first, memory_free_mib=1000), *others[1:]))
    plan = build_plan(source(v2_lite), busy_first, PlanRequest(tp=1), ABLE)
    assert plan.recommendation is not None
    assert plan.recommendation.command.startswith("CUDA_VISIBLE_DEVICES=3 ziphius start")


def test_mixed_cards(v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    plan = build_plan(source(v2_lite), host("mixed"), PlanRequest(), ABLE)
    assert any("differ" in note for note in plan.notes)
    two = cell(plan, "native", 2, "bf16")
    assert two.gpus == (0, 1)
    four = cell(plan, "native", 4, "bf16")
    assert four.verdict == "unsupported"
    assert "compute capability 7.5" in four.reason


def test_mig_slices(v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    plan = build_plan(source(v2_lite), host("mig"), PlanRequest(), ABLE)
    assert cell(plan, "native", 1, "bf16").verdict == "fits"
    assert cell(plan, "native", 1, "bf16").roofline is None
    assert cell(plan, "native", 2, "bf16").verdict == "unsupported"
    assert "NCCL" in cell(plan, "native", 2, "bf16").reason
    assert any("MIG" in note for note in plan.notes)


def test_without_gpus_it_plans_for_the_cpu(v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    plan = build_plan(source(v2_lite), host("cpu-only"), PlanRequest(), ABLE)
    assert plan.device == "cpu"
    assert {c.weights_format for c in plan.candidates} == {"int8", "bf16", "fp32"}
    assert plan.recommendation is not None
    assert plan.recommendation.command == "ziphius start --model /models/M"
    broken = build_plan(source(v2_lite), host("no-gpu"), PlanRequest(), ABLE)
    assert any("mismatch" in note for note in broken.notes)
    with pytest.raises(ConfigError, match="mismatch"):
        build_plan(source(v2_lite), host("no-gpu"), PlanRequest(device="cuda"), ABLE)


def test_a_cpu_that_is_too_small(v25: ModelConfig, source: MakeSource, host: GetHost) -> None:
    plan = build_plan(source(v25), host("no-gpu"), PlanRequest(), ABLE)
    assert not plan.fits
    assert {c.verdict for c in plan.candidates} == {"too_big"}
    assert "of main memory" in plan.candidates[0].reason


def test_llama_on_a_small_card(llama3_8b: ModelConfig, source: MakeSource) -> None:
    plan = build_plan(source(llama3_8b), parse_gpus("RTX4090"), PlanRequest(), ABLE)
    assert plan.recommendation is not None
    assert (plan.recommendation.tp, plan.recommendation.weights_format) == (1, "bf16")
    # 22.8 GiB free, 14.96 of weights, 131,072 bytes a token.
    assert 30_000 < plan.recommendation.kv_tokens < 60_000


def test_a_config_without_weights_is_noted(v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    plan = build_plan(source(v2_lite, has_weights=False), host("1xh200"), PlanRequest(), ABLE)
    assert any("no weights" in note for note in plan.notes)


def test_a_context_beyond_the_models(v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    with pytest.raises(ConfigError, match="163840"):
        build_plan(source(v2_lite), host("1xh200"), PlanRequest(context_length=163_841), ABLE)


def test_a_path_is_quoted(v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    plan = build_plan(source(v2_lite, given="/my models/$x"), host("1xh200"), PlanRequest(), ABLE)
    assert plan.recommendation is not None
    assert plan.recommendation.command == "ziphius start --model '/my models/$x'"
