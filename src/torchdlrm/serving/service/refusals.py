"""Defines why a request gets no prediction: a status and a reason, which reveal nothing about the server's inside."""

from http import HTTPStatus

from torchdlrm.errors import TorchDLRMError
from torchdlrm.features.columns import SparseColumn

MAX_VALUES = 1 << 19  # of all that a request may have in JSON; of a column, in all of its lists


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


def bad_request(message: str) -> RefusedRequest:
    """Refuse a body that is not what the route takes."""
    return RefusedRequest(HTTPStatus.BAD_REQUEST, message)


def not_found(message: str) -> RefusedRequest:
    """Refuse a model or version that there is not."""
    return RefusedRequest(HTTPStatus.NOT_FOUND, message)


def too_large(message: str) -> RefusedRequest:
    """Refuse a body with more bytes, or a request with more rows, than this server takes."""
    return RefusedRequest(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)


def check_num_rows(num_rows: int, max_rows: int) -> None:
    """Refuse a request with too many rows."""
    if num_rows > max_rows:
        raise too_large(f"{num_rows:,} rows in a request, and at most {max_rows:,} are taken; send several requests")


def check_num_values(num_values: int, column: SparseColumn) -> None:
    """Refuse a request with too many values in the lists of a column."""
    if num_values > MAX_VALUES:
        raise too_large(
            f"column {column.name!r}: {num_values:,} values in a request, and at most {MAX_VALUES:,} are taken; send "
            "several requests"
        )


def overloaded(message: str, retry_after_s: int = 1) -> RefusedRequest:
    """Refuse a request because there is more to do than can be done soon."""
    return RefusedRequest(HTTPStatus.SERVICE_UNAVAILABLE, message, retry_after_s)


def too_slow(body_timeout_s: float) -> RefusedRequest:
    """Refuse a request whose body did not come in time."""
    msg = f"the body did not come within {body_timeout_s:g} s, or was slow while many others were"
    return RefusedRequest(HTTPStatus.REQUEST_TIMEOUT, msg)


def too_late(message: str) -> RefusedRequest:
    """Refuse a request whose deadline has passed."""
    return RefusedRequest(HTTPStatus.GATEWAY_TIMEOUT, message)
