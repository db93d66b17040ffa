"""A real browser that shows somebody else's page lets it ask a server without a key nothing."""

import json
import socket
import time

import httpx
import pytest

ASK = """async (url) => {
    const post = {method: "POST", body: "[{}]"};
    const statuses = [], text = {"Content-Type": "text/plain"};
    for (const options of [{...post, mode: "no-cors", headers: text}, post, {mode: "no-cors"}])
        statuses.push(await fetch(url, options).then((answer) => answer.status, () => "failed"));
    statuses.push(navigator.sendBeacon(url, "[{}]"));
    return statuses;
}"""


@pytest.fixture(scope="module")
def server(serve, small_bundle):
    return serve(small_bundle)


@pytest.fixture
def page(browser):
    with browser.new_context() as context:
        yield context.new_page()


def counted(server):
    text = httpx.get(f"{server.url}/metrics", timeout=10).text
    found = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(("dlrm_requests_total", "dlrm_rows"))
    )
    refused = sum(float(count) for name, count in found.items() if 'code="403"' in name)
    return refused, float(found.get("dlrm_rows_total", 0))


@pytest.mark.parametrize("name", ["127.0.0.1", "evil.example"], ids=["another port", "another site"])
def test_pages_of_others_get_no_rows_predicted(page, server, page_server, name):
    refused_before, rows_before = counted(server)
    page.goto(page_server.replace("127.0.0.1", name) + "/nothing")  # a page without a policy of its own
    *fetched, is_queued = page.evaluate(ASK, f"{server.url}/predict")
    assert is_queued
    assert 200 not in fetched
    deadline_s = time.monotonic() + 10
    while counted(server)[0] < refused_before + 4:
        assert time.monotonic() < deadline_s, "all four arrive, and are refused"
        time.sleep(0.05)
    assert counted(server)[1] == rows_before


def test_a_name_that_was_made_to_point_here_reads_nothing(page, server):
    rebound = server.url.replace("127.0.0.1", "rebound.example")
    answer = page.goto(rebound)
    assert answer.status == 403
    assert "`allowed_hosts` rebound.example" in json.loads(answer.text())["error"]
    for path in ("/schema", "/predict", "/v2", "/metrics"):
        assert page.evaluate("async (path) => (await fetch(path)).status", path) == 403


def test_the_own_page_and_links_to_it_work(page, server, page_server):
    page.goto(page_server.replace("127.0.0.1", "evil.example") + "/nothing")
    with page.expect_navigation():
        page.evaluate("(url) => { location.href = url }", server.url)
    page.wait_for_selector("text=Probability of a click", state="attached")
    assert page.evaluate("async () => (await fetch('/schema')).status") == 200
    post = """async () => (await fetch("/predict", {method: "POST", body: "[{}]"})).status"""
    assert page.evaluate(post) == 200


@pytest.mark.parametrize(
    ("target", "header", "status"),
    [
        ("http://evil.example/schema", "localhost", b"403"),
        ("http://localhost@evil.example?/schema", "localhost", b"403"),
        ("http://localhost:8080/schema", "evil.example", b"200"),
        ("http://[::1]:8080/schema", "evil.example", b"200"),
        ("/schema", "[::1].evil.example", b"403"),
    ],
)
def test_the_host_of_a_whole_address_counts(server, target, header, status):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: {header}\r\n\r\n".encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 " + status)
