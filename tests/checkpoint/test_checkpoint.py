"""open_checkpoint: what counts as a model, and what is said about what does not."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from ziphius.checkpoint.checkpoint import open_checkpoint
from ziphius.checkpoint.packaged import fetchable_models
from ziphius.config import DEFAULT_MODEL
from ziphius.errors import CheckpointError, ConfigError, ModelError, ModelNotFound, UnsupportedModel

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_folder(path: Path, **changes: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return path


def test_a_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "my-model")
    checkpoint = open_checkpoint(str(folder), tmp_path)
    assert (checkpoint.path, checkpoint.format, checkpoint.name) == (folder, "hf", "my-model")
    assert checkpoint.config.eos_token_ids == (2,)
    assert checkpoint.tokenizer is None


def test_a_folder_with_a_tokenizer_joins_the_ends(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    tokenizer = {"added_tokens": [{"id": 9, "content": "<end>", "special": True}], "model": {"type": "BPE"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    checkpoint = open_checkpoint(str(folder), tmp_path)
    assert checkpoint.tokenizer is not None
    assert checkpoint.config.eos_token_ids == checkpoint.tokenizer.eos_token_ids == (2, 5, 9)


def test_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for model in ("m", "./m", "~/m", "m/"):
        assert open_checkpoint(model, tmp_path).path == tmp_path / "m"
    monkeypatch.chdir(tmp_path / "m")
    assert open_checkpoint(".", tmp_path).name == "m"


def test_the_default_model(smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = smollm2_path.parents[3]
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / DEFAULT_MODEL)
    checkpoint = open_checkpoint(DEFAULT_MODEL, home)
    assert (checkpoint.path, checkpoint.format, checkpoint.name) == (smollm2_path, "gguf", DEFAULT_MODEL)
    assert checkpoint.tokenizer is not None
    assert (checkpoint.tokenizer.bos_token, checkpoint.tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert not checkpoint.tokenizer.add_bos
    assert open_checkpoint(str(smollm2_path), home).path == smollm2_path
    assert open_checkpoint("./" + DEFAULT_MODEL, home).format == "hf"


def test_the_default_model_is_one_that_can_be_fetched() -> None:
    assert DEFAULT_MODEL in fetchable_models()


@pytest.mark.parametrize(
    "model", ["nope", "./nope", "/nope/at/all", "nope.gguf", "", " ", "SmolLM2", "a\0b", "~nobody-here/m"]
)
def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound) as caught:
        open_checkpoint(model, tmp_path)
    assert "no file or folder" in caught.value.message
    assert DEFAULT_MODEL in caught.value.message


def test_a_revision_of_what_has_none(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    for model in (str(folder), DEFAULT_MODEL):
        with pytest.raises(ConfigError, match="no model of the hub"):
            open_checkpoint(model, tmp_path, revision="main")


def test_a_config_is_enough_for_dummy_weights(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    checkpoint = open_checkpoint(str(folder / "config.json"), tmp_path, load_format="dummy")
    assert (checkpoint.path, checkpoint.format, checkpoint.name) == (folder, "hf", "m")
    assert checkpoint.tokenizer is not None  # of bytes
    assert checkpoint.tokenizer.eos_token_ids == checkpoint.config.eos_token_ids == (2,)
    assert open_checkpoint(str(folder), tmp_path).tokenizer is None
    (folder / "config.json").rename(tmp_path / "tiny.json")
    checkpoint = open_checkpoint(str(tmp_path / "tiny.json"), tmp_path, load_format="dummy")
    assert (checkpoint.path, checkpoint.name) == (tmp_path / "tiny.json", "tiny")
    assert checkpoint.config.hidden_size == 16
    with pytest.raises(CheckpointError, match="--load-format dummy"):
        open_checkpoint(str(tmp_path / "tiny.json"), tmp_path)


def test_a_chat_template_of_ones_own(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0].content }}é", encoding="utf-8")
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        open_checkpoint(str(folder), tmp_path, chat_template=str(template))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "its own"}')
    for given, expected in ((None, "its own"), (str(template), "{{ messages[0].content }}é")):
        found = open_checkpoint(str(folder), tmp_path, chat_template=given).tokenizer
        assert found is not None
        assert found.chat_template == expected
    for missing in (tmp_path / "nope.jinja", tmp_path):
        with pytest.raises(ConfigError, match="cannot read the chat template") as caught:
            open_checkpoint(str(folder), tmp_path, chat_template=str(missing))
        assert caught.value.param == "chat_template"
    template.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        open_checkpoint(str(folder), tmp_path, chat_template=str(template))


def test_a_broken_chat_template_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0].content }}\n{% if %}")
    with pytest.raises(ConfigError, match=r"mine\.jinja: the chat template is not valid Jinja: line 2") as caught:
        open_checkpoint("nobody/nothing", tmp_path, chat_template=str(template))
    assert caught.value.param == "chat_template"


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nothing"):
        open_checkpoint(str(tmp_path), tmp_path)
    for n in range(8):
        (tmp_path / f"photo{n}.jpg").touch()
    with pytest.raises(ModelNotFound, match=r"no config\.json in .* holds photo0\.jpg, .* and 2 more"):
        open_checkpoint(str(tmp_path), tmp_path)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"x" * 1000)
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        open_checkpoint(str(path), tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder nor a file"):
        open_checkpoint("/dev/null", tmp_path)


def test_errors_in_config_json_name_the_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", architectures=["GPT2LMHeadModel"])
    with pytest.raises(UnsupportedModel, match=r"/m: .*GPT2LMHeadModel"):
        open_checkpoint(str(folder), tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"/m/config\.json is not valid JSON"):
        open_checkpoint(str(folder), tmp_path)


READ_AS_NOBODY = """
import os, sys
from pathlib import Path
from ziphius.errors import ModelError
from ziphius.checkpoint.checkpoint import open_checkpoint
def look(folder):
    try:
        open_checkpoint(folder, Path(sys.argv[2]))
    except ModelError as e:
        return f"{type(e).__name__} {e}"
    return "readable"
if os.geteuid() == 0:
    look(sys.argv[1])  # imports what that needs: this environment may be root's alone
    os.seteuid(65534)
print(look(sys.argv[1]))
"""


@pytest.mark.parametrize("unreadable", ["m", "m/config.json", "m/tokenizer.json"])
def test_unreadable_folders_and_files(unreadable: str) -> None:
    """In a process of an unprivileged user, since root reads everything; so not under pytest's private folder."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = make_folder(Path(place) / "m")
        (folder / "tokenizer.json").write_text("{}")
        (Path(place) / unreadable).chmod(0)
        command = [sys.executable, "-c", READ_AS_NOBODY, str(folder), place]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        (Path(place) / unreadable).chmod(0o755)
    assert done.stderr == ""
    assert "cannot read" in done.stdout
    assert "Permission denied" in done.stdout
    assert str(folder) in done.stdout


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("ziphius.checkpoint.checkpoint", "torch transformers numpy gguf tokenizers jinja2 huggingface_hub httpx2"),
        ("ziphius.checkpoint.gguf", "torch transformers tokenizers jinja2"),
        ("ziphius.tokenizer.detokenizer", "torch transformers numpy gguf"),
        ("ziphius.installation", "torch numpy msgspec"),
    ],
)
def test_imports_stay_light(module: str, unwanted: str) -> None:
    code = f"import sys, {module}; print(*[m for m in {unwanted.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
