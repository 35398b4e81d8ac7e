"""One tree of errors. Each knows its HTTP status and OpenAI's `type` and `code`; the API renders them in one place.

FastslowError
├── InvalidRequest            400  malformed JSON, a bad parameter, an oversized message
│   ├── ContextLengthExceeded 400  the conversation alone does not fit the window
│   ├── InvalidFields         422  feedback or an admin call with a bad field
│   └── BodyTooLarge          413
├── AuthenticationFailed      401  no key, a bad key, an expired token
├── PermissionDenied          403  the key is not an admin's
├── NotFound                  404  an interaction, a version, a job, a scope
│   └── ModelNotFound         404
├── Conflict                  409  the key was used with another body; a version that can't be moved to
├── RequestTimeout            408  the body did not come in time
├── RateLimited               429  over a limit of the tenant's or the user's, with Retry-After
├── UpstreamRejected          4xx  vLLM's own refusal, its status and message passed on
├── Unavailable               503  with Retry-After
│   ├── EngineUnavailable     503  vLLM is away or overloaded
│   ├── Overloaded            503  as many chats as may be are in flight, or wait
│   ├── StoreUnavailable      503  Redis is away, full or read-only
│   ├── EmbedderUnavailable        the model behind recall; chats go on without it
│   └── VerifiersMissing      503  the packages that check replies are not installed
└── JobFailed                 (a consolidation ends as failed with this reason; never an HTTP reply)

All survive pickling, because Celery pickles or re-raises the errors of tasks.
"""

from typing import Any


class FastslowError(Exception):
    """Base of all errors.

    Args:
        message: what was wrong, where, and what to do.
        param: the request's field at fault, if one is.
        code: OpenAI's machine-readable code; the class's default if not given.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), dict(self.__dict__)))

    def body(self) -> dict[str, Any]:
        """The reply's JSON in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {}


def _rebuild(cls: type[FastslowError], state: dict[str, Any]) -> FastslowError:
    error = cls.__new__(cls)
    Exception.__init__(error, state["message"])
    error.__dict__.update(state)
    return error


class InvalidRequest(FastslowError):
    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class InvalidFields(InvalidRequest):
    status = 422


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "request_too_large"


class AuthenticationFailed(FastslowError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class PermissionDenied(FastslowError):
    status = 403
    type = "permission_error"
    code = "admin_key_required"


class NotFound(FastslowError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class Conflict(FastslowError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class RequestTimeout(InvalidRequest):
    status = 408
    code = "request_timeout"

    def headers(self) -> dict[str, str]:
        # What is left of the body is not waited for.
        return {"Connection": "close"}


class RateLimited(FastslowError):
    """Over a limit.

    Args:
        kind: OpenAI's `type` of this error: `requests` or `tokens`.
        retry_after_seconds: when there will be room; None if there never will be for this request.
    """

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, kind: str, retry_after_seconds: int | None) -> None:
        super().__init__(message)
        self.type = kind
        self.retry_after_seconds = retry_after_seconds

    def headers(self) -> dict[str, str]:
        # OpenAI's clients send a 429 again by themselves, unless they are told not to.
        again = self.retry_after_seconds
        return {"x-should-retry": "false"} if again is None else {"Retry-After": str(again)}


class UpstreamRejected(FastslowError):
    """vLLM's own refusal of a request, with the status it gave."""

    type = "invalid_request_error"

    def __init__(self, message: str, *, status: int, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status


class Unavailable(FastslowError):
    status = 503
    type = "service_unavailable_error"

    def __init__(self, message: str, *, retry_after_seconds: int = 1, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_seconds = retry_after_seconds

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after_seconds)}


class EngineUnavailable(Unavailable):
    code = "engine_unavailable"


class Overloaded(Unavailable):
    code = "overloaded"


class StoreUnavailable(Unavailable):
    code = "store_unavailable"


class EmbedderUnavailable(Unavailable):
    code = "embedder_unavailable"


class VerifiersMissing(Unavailable):
    code = "verifiers_missing"


class JobFailed(FastslowError):
    """Why a consolidation could not be done; the version in use stays."""

    code = "job_failed"
