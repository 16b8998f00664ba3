"""Every error Ziphius raises on purpose, with its HTTP status and its exit status.

ZiphiusError
├── ConfigError                 a flag, variable or file key is wrong                       exit 2
├── ModelError                  a checkpoint cannot be used as it is                         exit 1
│   ├── ModelNotFound           no such folder or model id
│   ├── UnsupportedModel        an architecture or a setting this engine does not have
│   ├── CheckpointError         files missing, truncated, left over or of the wrong shape
│   └── DownloadError           fetching failed; what was fetched is kept
├── DoesNotFit                  the plan says no                                             exit 1
│   └── LacksMemory             too little memory is free now; it may fit when more is free
├── InstanceError               a start, stop or look-up of an instance failed               exit 1
│   ├── AlreadyRunning
│   ├── PortInUse
│   └── StartFailed             the process ended, or did not become healthy
├── ImageError                  a container image could not be built or read                exit 1
├── RequestError                the caller's request is at fault                             HTTP 4xx
│   ├── InvalidRequest          400, names the field
│   ├── UnsupportedField        400, the field exists elsewhere but not here
│   ├── ContextLengthExceeded   400, names both numbers
│   ├── Unauthorized            401
│   ├── UnknownModel            404 model_not_found
│   ├── NotFound                404
│   └── BodyTooLarge            413
└── ServiceError                the server is at fault, or busy                              HTTP 5xx
    ├── NotReady                503 while loading
    ├── Overloaded              503 with Retry-After, before a stream starts
    ├── ShuttingDown            503 while draining
    └── EngineFailed            500, the engine process is gone, or it failed on this request
        └── RankLost            a rank could not reach the others: one of them is gone
"""

from __future__ import annotations

from typing import ClassVar


class ZiphiusError(Exception):
    """Base of the tree. `message` is one sentence for the person who can act on it."""

    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "internal_server_error"
    openai_code: ClassVar[str | None] = None
    exit_code: ClassVar[int] = 1
    retry_after_s: ClassVar[int | None] = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(ZiphiusError):
    exit_code = 2


class ModelError(ZiphiusError):
    pass


class ModelNotFound(ModelError):
    pass


class UnsupportedModel(ModelError):
    pass


class CheckpointError(ModelError):
    pass


class DownloadError(ModelError):
    pass


class DoesNotFit(ZiphiusError):
    pass


class LacksMemory(DoesNotFit):
    pass


class InstanceError(ZiphiusError):
    pass


class AlreadyRunning(InstanceError):
    pass


class PortInUse(InstanceError):
    pass


class StartFailed(InstanceError):
    pass


class ImageError(ZiphiusError):
    pass


class RequestError(ZiphiusError):
    http_status = 400
    openai_type = "invalid_request_error"


class InvalidRequest(RequestError):
    pass


class UnsupportedField(RequestError):
    openai_code = "unsupported_parameter"


class ContextLengthExceeded(RequestError):
    openai_code = "context_length_exceeded"


class Unauthorized(RequestError):
    http_status = 401
    openai_type = "authentication_error"
    openai_code = "invalid_api_key"


class UnknownModel(RequestError):
    http_status = 404
    openai_code = "model_not_found"


class NotFound(RequestError):
    http_status = 404
    openai_code = "not_found"


class BodyTooLarge(RequestError):
    http_status = 413
    openai_code = "body_too_large"


class ServiceError(ZiphiusError):
    http_status = 503
    openai_type = "service_unavailable"


class NotReady(ServiceError):
    openai_code = "not_ready"
    retry_after_s = 1


class Overloaded(ServiceError):
    openai_type = "overloaded_error"
    openai_code = "queue_full"
    retry_after_s = 1


class ShuttingDown(ServiceError):
    openai_code = "shutting_down"


class EngineFailed(ServiceError):
    http_status = 500
    openai_type = "internal_server_error"
    openai_code = "engine_failed"


class RankLost(EngineFailed):
    pass
