"""The verbs `image build` and `image info`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ziphius.cli.interrupts import interrupts_once
from ziphius.cli.options import Json
from ziphius.launchers.image import DEFAULT_SOURCE, ImageRecord

_IMAGE = Path("sglang.sif")

image = typer.Typer(
    name="image",
    help="Build and look at an Apptainer image of SGLang.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)


@image.command()
def build(
    from_: Annotated[
        str,
        typer.Option("--from", metavar="SOURCE", help="docker://NAME:TAG, docker-archive:FILE, FILE.def or a folder."),
    ] = DEFAULT_SOURCE,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The image to make.")] = _IMAGE,
    force: Annotated[bool, typer.Option("--force", help="Replace an image that is there.")] = False,
    json: Json = False,
) -> None:
    """Build an image with Apptainer.

    The file appears when it is whole; what was built from what is kept beside it, in FILE.json.
    """
    from ziphius.cli.output import phases, print_json
    from ziphius.manager.image_build import build as run

    target = out.expanduser().absolute()
    with interrupts_once(), phases() as progress:
        record = run(from_, target, os.environ, progress, replace=force)
    print_json(record) if json else _print(target, record)


@image.command()
def info(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image.", show_default=False)] = _IMAGE,
    json: Json = False,
) -> None:
    """Say what an image was built from, and when. Exit status 1 when it is not there, or not whole."""
    from ziphius.cli.output import print_json
    from ziphius.errors import ImageError
    from ziphius.launchers.image import read_record

    path = image.expanduser().absolute()
    if not path.exists():
        raise ImageError(f"there is no image {path}; `ziphius image build` makes one")
    record = read_record(path)
    if record is None:
        raise ImageError(f"{path} was not built by `ziphius image build`: nothing is on record of it")
    if path.stat().st_size != record.size_bytes:
        raise ImageError(
            f"{path} has {path.stat().st_size} bytes, and {record.size_bytes} when it was built: build it again"
        )
    print_json(record) if json else _print(path, record)


def _print(path: Path, record: ImageRecord) -> None:
    from ziphius.cli.output import size

    print(path)
    for label, value in (
        ("source", record.source),
        ("digest", record.digest or "not known"),
        ("sglang", record.sglang_version or "none in it"),
        ("built", f"{record.built_at}, apptainer {record.apptainer_version}"),
        ("size", size(record.size_bytes)),
    ):
        print(f"  {label:<7} {value}")
