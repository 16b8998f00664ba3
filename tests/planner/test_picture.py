"""Bars: what fills each GPU adds up, on the screen and in the SVG."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from ziphius.checkpoint.config import ModelConfig
from ziphius.planner.find_model import ModelSource
from ziphius.planner.hardware import Host
from ziphius.planner.picture import bars
from ziphius.planner.plan import Plan, PlanRequest
from ziphius.planner.planner import build_plan
from ziphius.planner.svg import svg

MakeSource = Callable[..., ModelSource]
GetHost = Callable[[str], Host]
HOSTS = ("1xh200", "2xh200", "4xh200", "8xh100", "mixed", "busy", "mig", "no-gpu", "cpu-only")


@pytest.fixture(params=HOSTS)
def plans(request: pytest.FixtureRequest, v25: ModelConfig, v2_lite: ModelConfig, source: MakeSource,
          host: GetHost) -> list[Plan]:  # fmt: skip
    there = host(request.param)
    wishes = [PlanRequest(), PlanRequest(tp=8, weights_format="bf16"), PlanRequest(tp=3)]
    if not there.gpus:
        wishes = [PlanRequest()]
    return [build_plan(source(config), there, wish) for config in (v25, v2_lite) for wish in wishes]


def test_segments_fill_each_bar(plans: list[Plan]) -> None:
    for plan in plans:
        for bar in bars(plan):
            inside = sum(s.nbytes for s in bar.segments if s.key != "over")
            assert inside == bar.total_bytes
            assert all(s.nbytes >= 0 for s in bar.segments)


def test_every_gpu_is_drawn(plans: list[Plan]) -> None:
    for plan in plans:
        drawn = bars(plan)
        missing = plan.shown.missing_gpus if plan.shown else 0
        assert sum(bar.there for bar in drawn) == max(1, len(plan.host.gpus))
        assert sum(not bar.there for bar in drawn) == (0 if any(g.mig for g in plan.host.gpus) else missing)
        filled = [bar for bar in drawn if any(s.key == "experts" and s.nbytes for s in bar.segments)]
        if plan.shown is not None and plan.device == "cuda":
            assert len(filled) == (1 if any(g.mig for g in plan.host.gpus) else plan.shown.tp)


def test_the_svg_is_well_formed_and_tells_sizes(plans: list[Plan]) -> None:
    for plan in plans:
        root = ElementTree.fromstring(svg(plan))
        assert root.tag.endswith("svg")
        tips = [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}title")]
        assert all("GiB" in tip for tip in tips)


def test_the_svg_says_what_cannot_run_yet(v25: ModelConfig, source: MakeSource, host: GetHost) -> None:
    root = ElementTree.fromstring(svg(build_plan(source(v25), host("mixed"), PlanRequest())))
    texts = [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "fp8 is planned, not in this version" in " ".join(texts)
    assert any("routed experts 103.7" in text for text in texts)
    assert max(map(len, texts)) <= 118


def test_names_are_escaped(v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    plan = build_plan(source(v2_lite, name="<&>"), host("1xh200"), PlanRequest())
    ElementTree.fromstring(svg(plan))
