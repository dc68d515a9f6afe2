"""Every error the server answers with. Each class carries its HTTP status and its OpenAI error code.

ServerError                         500 internal_error
├── BadRequest                      400 invalid_value (or a more specific code), with the field in `param`
│   ├── UnsupportedField            400 unsupported_parameter
│   └── ContextLengthExceeded       400 context_length_exceeded
├── Forbidden                       403 forbidden
├── ModelNotFound                   404 model_not_found
├── Conflict                        409 conflict (or a more specific code)
├── Overloaded                      503 overloaded, with Retry-After
│   ├── QueueFull                   429 rate_limit_exceeded, with Retry-After
│   └── EngineStalled               503 engine_stalled, with Retry-After
└── EngineDead                      503 engine_dead
adapters_store.errors.AdapterError  its own tree: 404, 422, 503; see there
ConfigError                         refused at start; never an HTTP answer
└── ModelUnsupported                a base that can't be served, with the reasons
"""

from __future__ import annotations


class ServerError(Exception):
    """Base of all that becomes an HTTP error. `param` names the request field at fault."""

    http_status = 500
    code = "internal_error"
    type = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    retry_after_s: int | None = None


class BadRequest(ServerError):
    http_status = 400
    code = "invalid_value"
    type = "invalid_request_error"


class UnsupportedField(BadRequest):
    code = "unsupported_parameter"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class ModelNotFound(ServerError):
    http_status = 404
    code = "model_not_found"
    type = "invalid_request_error"


class Forbidden(ServerError):
    http_status = 403
    code = "forbidden"
    type = "invalid_request_error"


class Conflict(ServerError):
    http_status = 409
    code = "conflict"
    type = "invalid_request_error"


class Overloaded(ServerError):
    http_status = 503
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Overloaded):
    http_status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"


class EngineStalled(Overloaded):
    code = "engine_stalled"


class EngineDead(ServerError):
    http_status = 503
    code = "engine_dead"


class ConfigError(Exception):
    """The configuration can't be served; says which flag, the value and the limit."""


class ModelUnsupported(ConfigError):
    """The base can't be served; the message lists the reasons."""
