"""TokenizerFiles: what a checkpoint's files say about its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ziphius.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Everything needed to build a Tokenizer and its ChatTemplate, whatever the checkpoint's format."""

    tokenizer_json: str
    """In the format of the `tokenizers` library."""
    chat_template: str | None
    """Jinja, or None when the checkpoint has none."""
    bos_token: str | None
    eos_token: str | None
    add_bos: bool
    """Whether plain text gets a BOS token in front. Chat templates write their own."""
    eos_token_ids: tuple[int, ...]
    """Every id that ends an answer, each once."""
    unk_token: str | None = None
    pad_token: str | None = None


def read_tokenizer_folder(folder: Path, eos_token_ids: tuple[int, ...] = ()) -> TokenizerFiles | None:
    """Read a Hugging Face folder's tokenizer; None when there is no tokenizer.json.

    `eos_token_ids` (config.json's) come first in the result; those of generation_config.json and the
    tokenizer's own eos_token are joined to them. CheckpointError names the file at fault.
    """
    text = _read(folder / "tokenizer.json")
    if text is None:
        return None
    tokenizer = _parsed(folder / "tokenizer.json", text)
    config = _read_object(folder / "tokenizer_config.json")
    eos_token = _token(config, "eos_token")
    own_eos = _token_id(tokenizer, eos_token)
    ids = [*eos_token_ids, *_generation_eos_ids(folder), *([] if own_eos is None else [own_eos])]
    return TokenizerFiles(
        tokenizer_json=text,
        chat_template=_chat_template(folder, config),
        bos_token=_token(config, "bos_token"),
        eos_token=eos_token,
        add_bos=_adds_bos(tokenizer, config),
        eos_token_ids=tuple(dict.fromkeys(ids)),
        unk_token=_token(config, "unk_token"),
        pad_token=_token(config, "pad_token"),
    )


def read_chat_template(path: Path) -> str:
    """A Jinja chat template kept in a file by itself. ConfigError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot read the chat template {path}: {e.strerror}", param="chat_template") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"the chat template {path} is not UTF-8 text", param="chat_template") from e


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}") from e


def _parsed(path: Path, text: str) -> Mapping[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as e:
        raise CheckpointError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


def _read_object(path: Path) -> Mapping[str, Any]:
    text = _read(path)
    return {} if text is None else _parsed(path, text)


def _token(config: Mapping[str, Any], key: str) -> str | None:
    """A special token's text, from a string or from an AddedToken that was saved as an object."""
    value = config.get(key)
    if isinstance(value, Mapping):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"tokenizer_config.json: {key} must be a string, not {value!r}")
    return value


def _token_id(tokenizer: Mapping[str, Any], token: str | None) -> int | None:
    if token is None:
        return None
    for added in tokenizer.get("added_tokens") or ():
        if added.get("content") == token:
            return int(added["id"])
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    found = vocabulary.get(token) if isinstance(vocabulary, Mapping) else None
    return found if isinstance(found, int) else None


def _generation_eos_ids(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    value = _read_object(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of them, not {value!r}")
    return ids


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja comes before tokenizer_config.json, as in transformers. Of several, take `default`."""
    from_file = _read(folder / "chat_template.jinja")
    if from_file is not None:
        return from_file
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, Mapping)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"tokenizer_config.json: chat_template must be a string, not {type(value).__name__}")
    return value


def _adds_bos(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """`add_bos_token` if it is set. Otherwise Llama's class adds BOS; for others the post-processor decides."""
    said = config.get("add_bos_token")
    if isinstance(said, bool):
        return said
    if config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return True
    bos = _token(config, "bos_token")
    return bos is not None and _post_processor_starts_with(tokenizer.get("post_processor"), bos)


def _post_processor_starts_with(processor: Any, token: str) -> bool:
    if not isinstance(processor, Mapping):
        return False
    if processor.get("type") == "Sequence":
        return any(_post_processor_starts_with(p, token) for p in processor.get("processors") or ())
    if processor.get("type") != "TemplateProcessing":
        return False
    first = (processor.get("single") or [{}])[0]
    return bool((first.get("SpecialToken") or {}).get("id") == token)
