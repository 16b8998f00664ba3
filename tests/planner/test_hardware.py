"""Named and recorded hosts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from ziphius.errors import ConfigError
from ziphius.planner.hardware import (
    CARDS,
    Gpu,
    Host,
    card_of,
    describe,
    emptied,
    parse_gpus,
    read_host,
    with_more_gpus,
)


def test_named_gpus() -> None:
    host = parse_gpus("4xH200")
    assert [g.index for g in host.gpus] == [0, 1, 2, 3]
    assert {(g.name, g.memory_total_mib, g.memory_free_mib) for g in host.gpus} == {("NVIDIA H200", 143_771, 143_155)}
    assert describe(host) == "4 x NVIDIA H200, 143,771 MiB each"
    mixed = parse_gpus("2x h100, L40S")
    assert [g.name for g in mixed.gpus] == ["NVIDIA H100 80GB HBM3"] * 2 + ["NVIDIA L40S"]


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("H200-NVL", "NVIDIA H200 NVL"),
        ("h200 sxm", "NVIDIA H200"),
        ("A100", "NVIDIA A100-SXM4-80GB"),
        ("A100-40", "NVIDIA A100-SXM4-40GB"),
        ("4090", "NVIDIA GeForce RTX 4090"),
        ("RTX5090", "NVIDIA GeForce RTX 5090"),
        ("RTX 5090", "NVIDIA GeForce RTX 5090"),
        ("H100-PCIe", "NVIDIA H100 PCIe"),
        ("H20", "NVIDIA H20"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"),
        ("A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB"),
    ],
)
def test_every_way_to_write_a_card(spec: str, name: str) -> None:
    assert parse_gpus(spec).gpus[0].name == name
    assert len(parse_gpus(f"2x{spec}").gpus) == 2


@pytest.mark.parametrize("spec", ["", "4x", "0xH200", "4xV100", "H200;H100", "-1xH200", "4xH200,,", "9999xH200"])
def test_bad_names_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="--gpu"):
        parse_gpus(spec)


@pytest.mark.parametrize("short", sorted(CARDS))
def test_each_card_is_found_again_by_the_name_that_nvml_tells(short: str) -> None:
    gpu = parse_gpus(short).gpus[0]
    assert card_of(gpu) == CARDS[short]
    assert 0.97 * gpu.memory_total_mib < gpu.memory_free_mib < gpu.memory_total_mib


def gpu(name: str, total: int = 24_564) -> Gpu:
    return Gpu(index=0, name=name, memory_total_mib=total, memory_free_mib=total - 400, compute_capability=(8, 9))


def test_cards_with_a_like_name_are_not_taken_for_them() -> None:
    assert card_of(gpu("NVIDIA GeForce RTX 4090 Laptop GPU")) is None
    assert card_of(gpu("NVIDIA GeForce RTX 4090 D")) is None
    assert card_of(gpu("NVIDIA GH200 480GB", 97_871)) is None
    assert card_of(gpu("NVIDIA A100-PCIE-40GB", 40_960)) == CARDS["A100-40"]


def test_recorded_hosts_read_back(host: Callable[[str], Host], data: Path, tmp_path: Path) -> None:
    for path in sorted(data.glob("host-*.json")):
        recorded = read_host(path)
        copy = tmp_path / path.name
        copy.write_bytes(msgspec.json.encode(recorded))
        assert read_host(copy) == recorded
    # The card's data sheet tells what an idle one reported.
    assert host("1xh200").gpus[0].memory_free_mib == CARDS["H200"].usable_mib


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "no recorded host"),
        ("{", "no recorded host"),
        ('{"gpus": [], "colour": "red"}', "colour"),
        ('{"gpus": [{"index": 0}]}', "name"),
        (
            '{"gpus": [{"index": 0, "name": "X", "memory_total_mib": 1, "memory_free_mib": 2,'
            ' "compute_capability": [9, 0]}]}',
            "2 MiB free of 1",
        ),
    ],
)
def test_broken_host_files_say_what_is_wrong(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "host.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_host(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_host(tmp_path / "none.json")


def test_the_freest_gpus_are_chosen(host: Callable[[str], Host]) -> None:
    busy = host("busy")
    assert [g.index for g in busy.chosen(3)] == [0, 1, 3]
    assert [g.index for g in busy.chosen(9)] == [0, 1, 2, 3]
    assert emptied(busy).gpus[2].memory_free_mib == 143_155
    assert emptied(host("4xh200")) == host("4xh200")


def test_more_gpus_are_like_the_best_and_idle(host: Callable[[str], Host]) -> None:
    grown = with_more_gpus(host("busy"), 6)
    assert [g.index for g in grown.gpus] == [0, 1, 2, 3, 4, 5]
    assert grown.gpus[5].memory_free_mib == 143_155
    assert with_more_gpus(host("mig"), 8) == host("mig")


def test_hosts_in_words(host: Callable[[str], Host]) -> None:
    assert describe(host("cpu-only")) == "AMD EPYC 9654 96-Core Processor, 96 cores, 725.0 GiB of memory free; no GPU"
    assert "MIG slice" in describe(host("mig"))
    assert describe(host("mixed")).count(" + ") == 2
