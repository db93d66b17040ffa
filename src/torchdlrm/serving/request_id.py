"""The name of a request, in the log lines, in the log of predictions and in the answer."""

MAX_REQUEST_ID_CHARACTERS = 128


def request_id_of(given: bytes | str) -> str | None:
    """The name that the client gave a request, if it is one that can stand in a log and a header.

    Args:
        given: the header or metadata `x-request-id`, or the field `id` of a message.

    Returns:
        The name; None where it is empty, too long, or not of printable ASCII.
    """
    if not 0 < len(given) <= MAX_REQUEST_ID_CHARACTERS or not given.isascii():
        return None
    text = given if isinstance(given, str) else given.decode("ascii")
    return text if text.isprintable() else None
