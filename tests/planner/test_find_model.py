"""From MODEL to a config: folders, files, Hugging Face's cache, and a stand-in of the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.checkpoint.stand_in_hub import StandInHub

from ziphius.checkpoint.hub_cache import hub_cache
from ziphius.checkpoint.quantization import Quantization
from ziphius.errors import ModelError, ModelNotFound, UnsupportedModel
from ziphius.planner.find_model import find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path, data: Path) -> Path:
    made = tmp_path / "DeepSeek-V2.5-1210"
    made.mkdir()
    shutil.copy(data / "deepseek-v2.5-1210.json", made / "config.json")
    return made


def cached(home: Path, model: str, config: Path) -> Path:
    """Hugging Face's cache with one model of which only config.json is there."""
    repository = home / "hub" / ("models--" + model.replace("/", "--"))
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copy(config, snapshot / "config.json")
    return snapshot


def test_a_folder_that_holds_nothing_but_its_config(folder: Path) -> None:
    found = find_model(str(folder), {})
    assert (found.name, found.origin, found.has_weights) == ("DeepSeek-V2.5-1210", "folder", False)
    assert found.config.num_hidden_layers == 60
    (folder / "model-00001-of-00055.safetensors").touch()
    assert find_model(str(folder), {}).has_weights


def test_a_bare_config(folder: Path) -> None:
    found = find_model(str(folder / "config.json"), {})
    assert (found.name, found.origin, found.path) == ("DeepSeek-V2.5-1210", "config.json", folder)


def test_hugging_faces_cache(tmp_path: Path, data: Path) -> None:
    snapshot = cached(tmp_path, "deepseek-ai/DeepSeek-V2.5-1210", data / "deepseek-v2.5-1210.json")
    found = find_model("deepseek-ai/DeepSeek-V2.5-1210", {"HF_HOME": str(tmp_path)})
    assert (found.name, found.origin, found.path) == ("DeepSeek-V2.5-1210", "hub cache", snapshot)


def test_where_the_cache_is() -> None:
    assert hub_cache({"HF_HUB_CACHE": "/a"}) == Path("/a")
    assert hub_cache({"HF_HOME": "/b"}) == Path("/b/hub")
    assert hub_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert hub_cache({"HOME": "/d"}) == Path("/d/.cache/huggingface/hub")


def test_a_quantized_checkpoint_is_told(folder: Path) -> None:
    config = folder / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "quantization_config": {"quant_method": "fp8"}}))
    assert find_model(str(folder), {}).config.quantization == Quantization("fp8", "fp8", blocks=False)
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config.write_text(json.dumps({**values, "quantization_config": blocks}))
    assert find_model(str(folder), {}).config.quantization == Quantization("fp8", "fp8", blocks=True)
    for unknown in ({"quant_method": "awq"}, {"quant_method": "fp8", "weight_block_size": [64, 64]}):
        config.write_text(json.dumps({**values, "quantization_config": unknown}))
        with pytest.raises(UnsupportedModel, match=r"awq|64, 64"):
            find_model(str(folder), {})
    config.write_text(json.dumps({**values, "quantization_config": {}}))
    with pytest.raises(ModelError, match="quant_method"):
        find_model(str(folder), {})


@pytest.mark.parametrize(
    "key",
    ["q_lora_rank", "n_routed_experts", "n_shared_experts", "first_k_dense_replace", "topk_method", "n_group",
     "topk_group", "moe_intermediate_size", "vocab_size", "max_position_embeddings", "norm_topk_prob"],
)  # fmt: skip
def test_a_missing_key_is_named_rather_than_guessed(folder: Path, key: str) -> None:
    config = folder / "config.json"
    values = json.loads(config.read_text())
    del values[key]
    config.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=rf"the key {key} is missing"):
        find_model(str(folder), {})


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"kv_lora_rank": None}, ModelError, "kv_lora_rank"),
        ({"num_hidden_layers": "many"}, ModelError, "num_hidden_layers"),
        ({"architectures": ["MixtralForCausalLM"]}, UnsupportedModel, "MixtralForCausalLM"),
        ({"topk_method": "noaux_tc"}, UnsupportedModel, "topk_method"),
        ({"q_lora_rank": -1}, ModelError, "q_lora_rank must be positive, not -1"),
        ({"n_shared_experts": -1}, ModelError, "n_shared_experts must be at least 0, not -1"),
        ({"topk_group": 9}, ModelError, "topk_group must be at most 8, not 9"),
        ({"num_experts_per_tok": 61}, ModelError, "num_experts_per_tok must be at most 60, not 61"),
    ],
)
def test_what_is_missing_or_unknown_is_named(
    folder: Path, change: dict[str, object], error: type[ModelError], told: str
) -> None:
    config = folder / "config.json"
    values = {**json.loads(config.read_text()), **change}
    config.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(error, match=told):
        find_model(str(folder), {})


@pytest.mark.parametrize("model", ["/nowhere/at/all", "", "nothing", "./a/b", "a/b/c"])
def test_nothing_there(model: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        find_model(model, {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})


def test_without_a_network_it_says_so_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="cannot be reached"):
        find_model("deepseek-ai/DeepSeek-V2.5-1210",
                   {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"})  # fmt: skip


def test_the_default_model_before_it_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="ziphius pull"):
        find_model("SmolLM2-135M-Instruct", {"ZIPHIUS_HOME": str(tmp_path)})


@pytest.fixture
def hub(data: Path) -> Iterator[StandInHub]:
    with StandInHub().serving() as stand_in:
        files = {"config.json": (data / "deepseek-v2-lite.json").read_bytes(), "model.safetensors": b"never fetched"}
        stand_in.repository("deepseek-ai/DeepSeek-V2-Lite").commit(files, "main")
        yield stand_in


def look_up(model: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    script = (
        "import os, sys\nfrom ziphius.errors import ModelError\nfrom ziphius.planner.find_model import find_model\n"
        "try:\n    found = find_model(sys.argv[1], os.environ)\n    print(found.origin, found.config.hidden_size)\n"
        "except ModelError as e:\n    print(e.message)\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    command = [sys.executable, "-c", script, model]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=60, check=True)


def test_only_the_config_is_fetched_and_then_found_in_the_cache(hub: StandInHub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    assert look_up("deepseek-ai/DeepSeek-V2-Lite", environment).stdout == "hub 2048\n"
    assert not hub.gets("model.safetensors")
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    assert look_up("deepseek-ai/DeepSeek-V2-Lite", offline).stdout == "hub cache 2048\n"


def test_a_model_that_the_hub_does_not_have(hub: StandInHub, tmp_path: Path) -> None:
    found = look_up("deepseek-ai/Nothing", {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)})
    assert "no model deepseek-ai/Nothing" in found.stdout
