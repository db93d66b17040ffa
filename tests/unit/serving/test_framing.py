"""Bytes of a connection become requests as RFC 9112 has it, however they are cut, and nothing else does."""

import random
import weakref
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.abused import SCALE
from torchdlrm.serving.framing import END, MAX_HEADER_BYTES, Head, RequestReader, Unreadable

HOST = b"Host: x\r\n"
POST = b"POST /predict?a=1 HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def requests_of(pieces):
    """All requests as (head, body, is_complete), and the status of what ended them, if anything did."""
    reader, found = RequestReader(), []
    try:
        for piece in pieces:
            reader.feed(piece)
            while (event := reader.next_event()) is not None:
                if isinstance(event, Head):
                    found.append([event, b"", False])
                elif event == END:
                    found[-1][2] = True
                else:
                    found[-1][1] += event
    except Unreadable as error:
        return found, error.status
    return found, None


def bodies(*pieces):
    found, status = requests_of(pieces)
    assert status is None
    assert all(is_complete for _, _, is_complete in found)
    return [(head.method, body) for head, body, _ in found]


def status_of(sent):
    """What a request is refused with."""
    found, status = requests_of([sent])
    assert not any(is_complete for _, _, is_complete in found)
    return status


@settings(deadline=None)
@given(data=st.data())
def test_requests_are_the_same_however_they_are_cut(data):
    text = st.binary(max_size=12)
    sent, wanted = b"", []
    for _ in range(data.draw(st.integers(1, 4))):
        body, cuts = data.draw(text), data.draw(st.lists(st.integers(0, 12), max_size=3))
        kind = data.draw(st.sampled_from(["GET", "length", "chunks"]))
        if kind == "GET":
            sent, body = sent + b"GET / HTTP/1.1\r\n" + HOST + b"\r\n", b""
        elif kind == "length":
            sent += POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
        else:
            edges = sorted({0, len(body), *(min(cut, len(body)) for cut in cuts)})
            chunks = [body[a:b] for a, b in pairwise(edges)]
            trailers = data.draw(st.sampled_from([b"", b"X-API-Key: a\r\n", b"A: b\r\nContent-Length: 7\r\n"]))
            sent += CHUNKED + b"".join(b"%x;e=1\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
            sent += b"0\r\n" + trailers + b"\r\n"
        wanted.append(("GET" if kind == "GET" else "POST", body))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=8)))
    assert bodies(*(sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True))) == wanted
    assert bodies(sent) == wanted
    assert bodies(*(sent[at : at + 1] for at in range(len(sent)))) == wanted


@pytest.mark.parametrize("token", [b"Upgrade", b"upgrade, HTTP2-Settings", b"close, Upgrade", b"keep-alive, Upgrade"])
@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"TLS/1.0"])
def test_an_offered_protocol_changes_nothing(token, protocol):
    offer = b"Connection: " + token + b"\r\nUpgrade: " + protocol + b"\r\n"
    inner = b"GET /inner HTTP/1.1\r\nHost: x\r\n\r\n"
    plain = b"GET / HTTP/1.1\r\n" + HOST + offer + b"\r\n"
    for body in (inner, b"x" * 70_000):
        whole = POST + offer + b"Content-Length: %d\r\n\r\n" % len(body) + body
        chunked = POST + offer + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        for sent in (whole, chunked, plain + whole):
            assert bodies(sent + inner)[-2:] == [("POST", body), ("GET", b"")]


PARTS = [
    *(b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\0", b"\x0b", b"\x85", b"hello", b"GET / HTTP/1.1"),
    *(b"A: b", b"A:", b" A: b", b"A : b", b"Host: x", b"Host:", b"Connection: close", b"Connection: Upgrade"),
    *(b"Content-Length: 5", b"content-length: 0", b"Content-Length:5 ", b"Content-Length: 0x5", b" Content-Length: 5"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding:", b"Transfer-Encoding : chunked", b"Upgrade: h2c"),
]


def test_a_head_that_is_taken_means_line_by_line_what_it_says(seed):
    rng, num_taken = random.Random(seed), 0
    for _ in range(10_000 * SCALE):
        lines = b"".join(
            rng.choice(PARTS) + rng.choice([b"", b"\r\n", b"\r\n", b"\r\n"]) for _ in range(rng.randint(0, 6))
        )
        head = b"POST / HTTP/1.1\r\n" + rng.choice([b"", HOST]) + lines + rng.choice([b"\r\n", b"\r\n\r\n", b"\n"])
        sent = head + rng.choice([b"", b"hello", b"GET /b HTTP/1.1\r\nHost: x\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n"])
        found, status = requests_of([sent])
        if found:
            written = sent.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
            pairs = [line.partition(b":") for line in written]
            assert found[0][0].headers == [(name.lower(), value.strip(b" \t")) for name, _, value in pairs], sent
            assert not any(line[:1] in b" \t" or b"\r" in line or b"\n" in line for line in written), sent
            num_taken += 1
        else:
            assert status is not None or b"\r\n\r\n" not in sent
    assert num_taken > 500


REFUSED = {
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
    "two Hosts in HTTP/1.0": (b"GET / HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    "a Host that is none": (b"GET / HTTP/1.1\r\nHost: x/y\r\n\r\n", 400),
    "chunked in HTTP/1.0": (CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0"), 400),
    "gzip, chunked": (CHUNKED.replace(b": chunked", b": gzip, chunked"), 400),
    "chunked, chunked": (CHUNKED.replace(b": chunked", b": chunked, chunked"), 400),
    "gzip": (CHUNKED.replace(b": chunked", b": gzip"), 400),
    "chunked twice": (CHUNKED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n", 400),
    "length and chunked": (CHUNKED[:-2] + b"Content-Length: 4\r\n\r\n", 400),
    "two lengths": (POST + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\n", 400),
    "a list of lengths": (POST + b"Content-Length: 4, 4\r\n\r\n", 400),
    "a length that is none": (POST + b"Content-Length: +4\r\n\r\n", 400),
    "no length": (POST + b"Content-Length:\r\n\r\n", 400),
    "a folded header": (POST + b"A: b\r\n c\r\n\r\n", 400),
    "a space before the colon": (POST + b"Content-Length : 4\r\n\r\n", 400),
    "NUL": (POST + b"A: \x00\r\n\r\n", 400),
    "a bare CR": (POST + b"A: b\rC: d\r\n\r\n", 400),
    "bare LFs": (b"GET / HTTP/1.1\nHost: x\n\n", 400),
    "a head that ends in a bare LF": (POST + b"\nGET / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "no HTTP": (b"hello\r\n", 400),
    "TLS": (b"\x16\x03\x01", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "a proxy's": (b"CONNECT x:80 HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "long": (POST + b"A: " + b"a" * MAX_HEADER_BYTES + b"\r\n\r\n", 431),
    "long and not ended": (POST + b"A: " + b"a" * MAX_HEADER_BYTES, 431),
    "many": (POST + b"a: b\r\n" * 6_000, 431),
    "empty lines": (b"\r\n\r\n", 400),
    "empty lines before a request": (b"\r\n\r\n" + POST + b"\r\n", 400),
    "no size of a chunk": (CHUNKED + b"\r\n", 400),
    "a signed size": (CHUNKED + b"+1\r\na\r\n0\r\n\r\n", 400),
    "a size with a prefix": (CHUNKED + b"0x1\r\na\r\n0\r\n\r\n", 400),
    "a space behind the size": (CHUNKED + b"1 \r\na\r\n0\r\n\r\n", 400),
    "a size beyond numbers": (CHUNKED + b"f" * 17 + b"\r\na\r\n0\r\n\r\n", 400),
    "a longer chunk": (CHUNKED + b"1\r\nab\r\n0\r\n\r\n", 400),
    "an LF behind a size": (CHUNKED + b"1;\na\r\n0\r\n\r\n", 400),
    "an endless size": (CHUNKED + b"1;" + b"a" * 2_000, 400),
    "trailers that are none": (CHUNKED + b"0\r\nGET / HTTP/1.1\r\n\r\n", 400),
    "trailers with a bare LF": (CHUNKED + b"0\r\nA: b\nC: d\r\n\r\n", 400),
    "long trailers": (CHUNKED + b"0\r\n" + b"a1: b\r\n" * 6_000 + b"\r\n", 431),
    "endless trailers": (CHUNKED + b"0\r\n" + b"a1: b\r\n" * 6_000, 431),
    "much beside the chunks": (CHUNKED + (b"1;" + b"a" * 600 + b"\r\na\r\n") * 60 + b"0\r\n\r\n", 431),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_could_be_read_in_two_ways_or_is_too_long_is_refused(what):
    sent, status = REFUSED[what]
    assert status_of(sent) == status


def test_one_empty_line_before_a_request_and_white_space_around_a_value_mean_nothing():
    request = POST + b"Content-Length: \t4 \r\nX-API-Key:a\t\r\n\r\nabcd"
    for sent in ([request * 2], [request + b"\r\n" + request], [b"\r", b"\n" + request, b"\r\n", request]):
        assert bodies(*sent) == [("POST", b"abcd")] * 2
    assert requests_of([request])[0][0][0].headers[1:] == [(b"content-length", b"4"), (b"x-api-key", b"a")]


def test_a_reader_that_is_dropped_is_gone_at_once():
    reader = RequestReader()
    reader.feed(POST)
    reader.next_event()
    was_there = weakref.ref(reader)
    del reader
    assert was_there() is None, "what it has read would stay until the collector comes"


def test_a_trailer_is_no_header():
    (head, body, is_complete), *others = requests_of([CHUNKED + b"1\r\na\r\n0\r\nX-API-Key: a\r\n\r\n"])[0]
    assert (body, is_complete, others) == (b"a", True, [])
    assert [name for name, _ in head.headers] == [b"host", b"transfer-encoding"]


@pytest.mark.parametrize(
    ("version", "connection", "keeps_alive"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: close\r\n", False),
        (b"1.1", b"Connection: Upgrade, Close\r\n", False),
        (b"1.1", b"Connection: Upgrade\r\nConnection: close\r\n", False),
        (b"1.1", b"Connection: close\r\nConnection: Upgrade\r\n", False),
        (b"1.0", b"", False),
    ],
)
def test_whether_the_connection_goes_on(version, connection, keeps_alive):
    sent = b"GET / HTTP/" + version + b"\r\n" + HOST + connection + b"\r\n"
    assert requests_of([sent])[0][0][0].keeps_alive == keeps_alive


def test_nothing_is_done_ahead():
    reader = RequestReader()
    request = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
    reader.feed(request * 1_000)
    for num_left in (999, 998):
        assert isinstance(reader.next_event(), Head)
        assert reader.next_event() == END
        assert reader.num_waiting == num_left * len(request)
