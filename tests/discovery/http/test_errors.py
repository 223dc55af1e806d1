"""Descriptions of failures of real requests, which are always the same."""

import socket
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from aiohttp import web

from discovery.http.errors import explained

pytestmark = pytest.mark.anyio


async def failure(url: str, context: ssl.SSLContext) -> str:
    async with aiohttp.ClientSession() as session:
        with pytest.raises((aiohttp.ClientError, OSError)) as caught:
            await session.get(url, ssl=context)
    return explained(caught.value)


async def test_a_refused_connection() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        told = {await failure(f"https://127.0.0.1:{port}/", ssl.create_default_context()) for _ in range(2)}
    assert len(told) == 1
    assert told.pop().startswith(f"cannot connect to 127.0.0.1:{port}: Connect call failed")


async def test_an_untrusted_certificate(tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority = trustme.CA()
    authority.issue_cert("other.example").configure_cert(context)
    runner = web.AppRunner(web.Application(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    try:
        url = f"https://127.0.0.1:{runner.addresses[0][1]}/"
        assert "certificate verify failed" in await failure(url, ssl.create_default_context())
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        assert "certificate is not valid for '127.0.0.1'" in await failure(url, trusting)
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(("error", "told"), [(TimeoutError(), "TimeoutError"), (OSError("x" * 999), "x" * 300)])
def test_every_error_has_a_description(error: Any, told: str) -> None:
    assert explained(error) == told
