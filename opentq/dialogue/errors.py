"""Errors that a client is meant to read: one class, with the status, and the shape that OpenAI's clients expect."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """What is wrong with a request, for the person who sent it.

    Attributes:
        status: HTTP status.
        message: what is wrong, the value, what to do.
        param: the field it is about, as in `messages[3].role`.
        code: a short fixed word for programs, as in `context_length_exceeded`.
        retry_after: seconds after which a retry makes sense (503 only).
    """

    def __init__(self, status: int, message: str, param: str = "", code: str = "", retry_after: int = 0):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        """OpenAI's `type` for the status."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "overloaded_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param or None,
                "code": self.code or None,
            }
        }

    def headers(self) -> dict[str, str]:
        return {"retry-after": str(self.retry_after)} if self.retry_after else {}


class Gone(ApiError):
    """Nobody is there to be answered."""

    def __init__(self) -> None:
        super().__init__(499, "the client went away", code="client_closed")


def bad(message: str, param: str = "", code: str = "") -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, param, code)


def missing(param: str) -> ApiError:
    """400: a field that has to be there."""
    return bad(f"{param} is missing", param, "missing_required_parameter")


def text_of(fields: dict[str, Any], name: str, path: str) -> str:
    """The text in the field `name` of what stands at `path`. Raises ApiError where there is none."""
    if not isinstance(fields.get(name), str):
        raise missing(f"{path}.{name}")
    return fields[name]


def unsupported(param: str, hint: str = "") -> ApiError:
    """400: a field that OpenAI knows and this server does not serve; never accepted and ignored."""
    return bad(
        f"{param} is not supported by this server" + (f": {hint}" if hint else ""), param, "unsupported_parameter"
    )


def overloaded(message: str, retry_after: int, code: str = "overloaded") -> ApiError:
    """503: a correct request that does not fit now."""
    return ApiError(503, message, "", code, max(1, retry_after))
