"""What can go wrong in a request, as OpenAI's error documents."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from medge.errors import ContextError, CorruptError, MedgeError, MissingExtraError, UnsupportedError, UsageError

LOG = logging.getLogger("medge.serve")
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Status -> OpenAI's `type`; else a server's own fault, or an invalid request."""
_CODES: dict[type[MedgeError], tuple[int, str]] = {
    ContextError: (400, "context_length_exceeded"),
    UsageError: (400, "invalid_value"),
    UnsupportedError: (400, "unsupported"),
    MissingExtraError: (501, "not_installed"),
    CorruptError: (500, "corrupt_model"),
}
"""Most special first."""


class ApiError(Exception):
    """A request that is not answered: a status, one line, and the code that programs read."""

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, headers: Mapping[str, str] = {}
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = " ".join(message.split())
        self.code = code
        self.param = param
        self.headers = headers

    def document(self) -> dict[str, Any]:
        """OpenAI's form."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.document(), self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that asks for what cannot be."""
    return ApiError(400, message, code, param=param)


def refusal(error: Exception) -> ApiError:
    """The answer to whatever went wrong. What nobody expected is logged: its kind and place alone, since its text may
    quote a prompt.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MedgeError):
        return known(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    LOG.error("internal error: %s in %s, line %s", type(error).__name__, Path(last.filename).name, last.lineno)
    return ApiError(500, "An error of the server itself; its log says where", "internal_error")


def known(error: MedgeError) -> ApiError:
    """An expected failure of the library."""
    status, code = next((found for kind, found in _CODES.items() if isinstance(error, kind)), (500, "server_error"))
    return ApiError(status, str(error), code)


def unreadable(error: ValidationError) -> ApiError:
    """A body that does not fit its model: its first fault, never what it holds."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "json_invalid":
        return invalid(f"The body is no JSON: {first['msg']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return invalid(f"'{where}' is no field that this server knows", where, "unknown_parameter")
    return invalid(f"{where}: {first['msg']}", where)
