"""Keys and the file that holds them; and without a key, a server answers to its own names and its own page alone."""

import pytest

from torchdlrm.errors import ConfigError
from torchdlrm.serving.front.access import AllowedHosts, ApiKeys, read_api_keys


def refusal(headers, *, host="127.0.0.1", also=(), method="POST", is_for_all=False):
    lower = {name.lower().encode(): value.encode() for name, value in headers.items()}
    return AllowedHosts(host, also).refusal(method, lower, is_for_all=is_for_all)


OWN = [
    "localhost", "localhost:8080", "LOCALHOST.:8080", "app.localhost:3000", "127.0.0.1:8080", "[::1]:8080", "[::1]",
    "192.168.1.7:8080", "model", "model:8080", "torchdlrm.default.svc:80", "torchdlrm.default.svc.cluster.local",
    "host.docker.internal:8080",
]  # fmt: skip
FOREIGN = [
    "rebound.example",
    "rebound.example:8080",
    "localhost.example",
    "127.0.0.1.example",
    "a.svc.example",
    "1.2",
    "[::1].evil.example",
    "[::1]evil",
]


@pytest.mark.parametrize("host", OWN)
def test_its_own_names_are_answered_to(host):
    assert refusal({"Host": host}) is None
    assert refusal({"Host": host, "Origin": f"http://{host}"}) is None


@pytest.mark.parametrize("host", FOREIGN)
def test_names_that_anybody_can_have_are_not(host):
    for is_for_all in (False, True):
        told = refusal(
            {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}, is_for_all=is_for_all
        )
        assert f"`allowed_hosts` {host.removesuffix(':8080')}" in told


def test_names_are_added_by_hand():
    also = ("model.example.com", "*.example.org")
    for host in ("model.example.com", "MODEL.example.com:443", "a.example.org", "b.a.example.org"):
        assert refusal({"Host": host}, also=also) is None
    for host in ("example.com", "a.model.example.com", "example.org", "badexample.org"):
        assert refusal({"Host": host}, also=also)
    assert refusal({"Host": "model.example.net"}, host="model.example.net") is None
    assert refusal({"Host": "anything.example", "Origin": "http://evil.example"}, also=("*",)) is None


def test_clients_that_are_no_browsers_need_not_know_of_this():
    assert refusal({}) is None  # HTTP/1.0
    assert refusal({"Host": "localhost", "Content-Type": "application/x-www-form-urlencoded"}) is None


HERE = "localhost:8080"
FROM_ANOTHER = {
    "fetch without cors": {
        "Origin": "http://evil.example",
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "no-cors",
    },
    "another port": {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
    "an older browser": {"Origin": "http://evil.example"},
    "an older browser, another port": {"Origin": "http://localhost:3000"},
    "a page without an origin": {"Origin": "null"},
    "a form": {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    "no origin told": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
}


@pytest.mark.parametrize("what", FROM_ANOTHER)
def test_requests_of_other_pages_are_refused(what):
    headers = {"Host": HERE, **FROM_ANOTHER[what]}
    assert "another site" in refusal(headers)
    assert refusal(headers, is_for_all=True) is None
    assert refusal(headers, also=("*",)) is None


def test_its_own_page_and_links_are_answered():
    for headers in (
        {"Origin": "http://localhost:8080", "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"},
        {"Origin": "http://localhost:8080"},
        {"Origin": "https://model.example", "Sec-Fetch-Site": "same-origin"},  # a proxy that asks by an address
        {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},
    ):
        assert refusal({"Host": HERE, **headers}) is None
    link = {"Host": HERE, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert refusal(link, method="GET") is None
    assert refusal(link, method="POST")


def test_a_site_that_is_allowed_may_ask():
    headers = {"Host": HERE, "Origin": "https://front.example", "Sec-Fetch-Site": "cross-site"}
    assert refusal(headers)
    assert refusal(headers, also=("front.example",)) is None


def test_a_byte_order_mark_comments_and_blank_lines_are_no_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbffirst key\r\n\r\n# of the page\r\n  second#2  \r\n\t\n")
    keys = read_api_keys(path)
    assert keys == ("first key", "second#2")
    accepted = ApiKeys(keys)
    assert accepted.accept({b"authorization": b"Bearer first key"})
    assert not accepted.accept({b"x-api-key": b"# of the page"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no key; write one a line"),
        (b"\xef\xbb\xbf\n# only a comment\n \n", "holds no key; write one a line"),
        ("key".encode("utf-16"), "is no text in UTF-8"),
        (b"key\nan\x00other\n", "line 2 holds a character that no header may have"),
        *(
            (f"key\nan{end}other\n".encode(), "line 2 holds a character")
            for end in "\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
        ),
        (b"key\x0b\n", "line 1 holds a character"),
    ],
)
def test_a_file_without_keys_that_can_be_sent_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refused:
        read_api_keys(path)
    assert str(refused.value).startswith(f"`api_key_file` {path}: ")
    assert "\n" not in str(refused.value)
    assert "other" not in str(refused.value), "a key is not told"


def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=f"^`api_key_file` {tmp_path}: cannot be read: Is a directory$"):
        read_api_keys(tmp_path)
