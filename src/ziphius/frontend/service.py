"""Service: one server's state (phase, model, engine client), which its endpoints share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from ziphius.config import ServeConfig
from ziphius.errors import EngineFailed, NotReady, ShuttingDown, ZiphiusError
from ziphius.frontend.engine_client import EngineClient
from ziphius.frontend.metrics import Exposition, Metrics
from ziphius.frontend.model import ServedModel
from ziphius.frontend.sampling import ModelLimits
from ziphius.installation import package_version
from ziphius.ipc.messages import LoadProgress, Ready

State = Literal["loading", "ready", "draining", "failed"]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The body of GET /status, which the manager shows. It holds no secrets."""

    state: State
    progress: LoadProgress | None
    model: str
    uptime_s: float
    running: int
    queued: int
    generated_tokens_per_s: float
    prompt_tokens_per_s: float
    kv_tokens: int
    kv_tokens_used: int
    engine_pids: list[int]
    version: str
    error: str | None


@dataclass(slots=True)
class Service:
    """Everything that an endpoint may need. Only `serve` changes it."""

    config: ServeConfig
    client: EngineClient
    metrics: Metrics
    exposition: Exposition
    state: State = "loading"
    progress: LoadProgress = field(default_factory=lambda: LoadProgress(phase="starting"))
    model: ServedModel | None = None
    ready: Ready | None = None
    failure: ZiphiusError | None = None
    engine_pids: list[int] = field(default_factory=list)
    started_at: float = field(default_factory=time.monotonic)
    version: str = field(default_factory=package_version)
    write_timeout_s: float = 60.0
    """The request of a client that reads nothing for so long is aborted."""

    @property
    def healthy(self) -> bool:
        """Whether a request would be answered now."""
        return self.state == "ready" and not self.client.stalled

    def require_model(self) -> ServedModel:
        """The model, if it can generate now. Otherwise NotReady, ShuttingDown or EngineFailed."""
        if self.state == "ready" and self.model is not None:
            return self.model
        error = self._refusal()
        self.metrics.rejected[error.openai_code or "failed"] += 1
        raise error

    def described_model(self) -> ServedModel:
        """The model, ready or not, once its checkpoint is open. Else NotReady, ShuttingDown or EngineFailed."""
        if self.model is None:
            raise self._refusal()
        return self.model

    def set_ready(self, ready: Ready) -> None:
        """From now on requests are taken."""
        assert self.model is not None
        self.ready = ready
        self.metrics.context_length = min(ready.context_length, ready.kv_tokens)
        self.model.limits = ModelLimits(
            vocab_size=min(ready.vocab_size, self.model.info.vocab_size), context_length=self.metrics.context_length
        )
        if self.state == "loading":
            self.state = "ready"

    def unhealthy_reason(self) -> str:
        if self.state == "ready":
            return "the engine has said nothing for a long time although it has work"
        return self._refusal().message

    def status(self) -> Status:
        metrics = self.metrics
        return Status(
            state=self.state,
            progress=self.progress if self.state == "loading" else None,
            model=self.model.info.name if self.model is not None else self.config.served_model_name or "",
            uptime_s=round(time.monotonic() - self.started_at, 3),
            running=metrics.engine.running,
            queued=metrics.engine.queued,
            generated_tokens_per_s=round(metrics.generated_rate.rate(), 2),
            prompt_tokens_per_s=round(metrics.prompt_rate.rate(), 2),
            kv_tokens=metrics.kv_tokens or (self.ready.kv_tokens if self.ready is not None else 0),
            kv_tokens_used=metrics.kv_tokens_used,
            engine_pids=self.engine_pids,
            version=self.version,
            error=self.failure.message if self.failure is not None else None,
        )

    def _refusal(self) -> ZiphiusError:
        if self.state == "draining":
            return ShuttingDown("The server is shutting down.")
        if self.state == "failed":
            return EngineFailed(self.failure.message if self.failure is not None else "the engine has failed")
        progress = self.progress
        percent = f" {100 * progress.done // progress.total}%" if progress.total else ""
        return NotReady(f"The model is not ready yet: {progress.phase}{percent}.")
