"""Why a request gets no prediction: a status, a reason for its sender, and nothing about the inside of the server."""

from collections.abc import Mapping
from http import HTTPStatus

from torchdlrm.errors import TorchDLRMError


class RefusedRequest(TorchDLRMError):  # noqa: N818 - it is an answer
    """A request that is not answered with a prediction.

    Args:
        status: what HTTP calls the reason.
        message: says to the sender what is wrong, with which value, and what to do.
        retry_after_s: when it may be worth asking again, in whole seconds.
    """

    def __init__(self, status: HTTPStatus, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the answer."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def bad_request(message: str) -> RefusedRequest:
    """The body is not what the route takes."""
    return RefusedRequest(HTTPStatus.BAD_REQUEST, message)


def not_found(message: str) -> RefusedRequest:
    """There is no such model or version."""
    return RefusedRequest(HTTPStatus.NOT_FOUND, message)


def too_large(message: str) -> RefusedRequest:
    """The body has more bytes, or the request more rows, than this server takes."""
    return RefusedRequest(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)


def overloaded(message: str, retry_after_s: int = 1) -> RefusedRequest:
    """There is more to do than can be done soon."""
    return RefusedRequest(HTTPStatus.SERVICE_UNAVAILABLE, message, retry_after_s)


def too_late(message: str) -> RefusedRequest:
    """The deadline has passed."""
    return RefusedRequest(HTTPStatus.GATEWAY_TIMEOUT, message)
