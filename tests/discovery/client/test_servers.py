"""Servers: which URLs may be used, and in what order."""

import pytest
from yarl import URL

from discovery.client.servers import BACKOFF, ServerRetries, Servers, parse_server_url
from discovery.files.tls_files import TlsFiles

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://10.0.0.2:8600", "https://10.0.0.2:8600"),
        ("https://discovery.example", "https://discovery.example"),
        ("https://10.0.0.2:8600/", "https://10.0.0.2:8600"),
        ("http://127.0.0.1:8600", "http://127.0.0.1:8600"),
        ("http://127.9.9.9:8600", "http://127.9.9.9:8600"),
        ("http://[::1]:8600", "http://[::1]:8600"),
        ("http://localhost:8600", "http://localhost:8600"),
    ],
)
def test_urls(text: str, url: str) -> None:
    assert str(parse_server_url(text)) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10.0.0.2:8600",
        "http://10.0.0.2:8600",
        "http://localhost.example:8600",
        "http://127.0.0.1.example",
        "ftp://127.0.0.1",
        "https://",
        "https://user@10.0.0.2",
        "https://user:password@10.0.0.2",
        "https://10.0.0.2/path",
        "https://10.0.0.2?query",
        "https://10.0.0.2#fragment",
        "https://10.0.0.2:99999",
        "https://[::1",
        "mesh.yaml",
    ],
)
def test_bad_urls(text: str) -> None:
    with pytest.raises(ValueError, match="expected https://HOST:PORT"):
        parse_server_url(text)


def test_http_to_other_hosts_must_be_permitted() -> None:
    assert parse_server_url("http://10.0.0.2:8600", insecure=True)
    with pytest.raises(ValueError, match="insecure: true"):
        parse_server_url("http://10.0.0.2:8600")


def servers(count: int) -> Servers:
    urls = [URL(f"http://127.0.0.{number}") for number in range(1, count + 1)]
    return Servers(urls, token=None, tls=TlsFiles(), on_epoch=lambda _: None)


def test_the_next_server_is_used_after_a_failure() -> None:
    three = servers(3)
    first = three.current
    three.failed(first)
    second = three.current
    three.failed(first)  # another request has failed there, too: already handled
    assert three.current == second != first
    three.failed(second)
    three.failed(three.current)
    assert three.current == first


def test_pauses_grow_and_begin_after_all_servers_were_tried() -> None:
    retries = ServerRetries(servers(2))
    assert retries.next_pause_s() == 0  # the second server is tried at once
    pauses = [retries.next_pause_s() for _ in range(30)]
    assert 0.1 <= pauses[0] <= 0.2
    assert all(BACKOFF.longest_s / 2 <= pause <= BACKOFF.longest_s for pause in pauses[-10:])
    assert len(set(pauses[-10:])) > 1
    retries.succeeded()
    assert retries.next_pause_s() == 0


async def test_requests_need_a_connected_context() -> None:
    one = servers(1)
    with pytest.raises(RuntimeError, match="connected"):
        await one.request("GET", one.current, "/healthz")
    async with one.connected():
        async with one.connected():
            session = one._session
        assert one._session is session
    assert one._session is None
