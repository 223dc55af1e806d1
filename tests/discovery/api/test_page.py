"""The page: complete without its script, limited to what its reader may see, and live in a real browser."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from discovery.api.page import MAX_NODES, MAX_ROWS, PageState, age_text, render_page
from discovery.model.mesh import (
    AllocationSpec,
    GatewaySpec,
    Kind,
    Mesh,
    NetworkSpec,
    Record,
    RelaySpec,
    ServiceSpec,
    TurnSpec,
)
from discovery.store import Store
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio

TURN = TurnSpec(url="turn:192.0.2.7?transport=tcp", relay_addresses=["10.0.0.7"], port_min=50000, port_max=50100)
STATE = PageState(epoch="e", revision=7, stale_s=0, reader="operator", ages={})


class Text(HTMLParser):
    """The text of a page. Also checks that its tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.links, self._open = "", [], []  # type: ignore[var-annotated]
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "a":
            self.links.append(dict(attrs)["href"])
        if tag not in ("meta", "link"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


async def fill(store: Store) -> None:
    for network in "abc":
        await store.put((Kind.NETWORK, network, network), NetworkSpec())
        await store.put((Kind.TURN, network, "turn-1"), TURN)
    for network in "ab":
        await store.put((Kind.RELAY, network, "relay-1"), RelaySpec(addresses=["10.0.0.9"], ports=[443]))
    await store.put((Kind.SERVICE, "b", "o"), ServiceSpec(name="orders.shop", ports={"8443": ["10.1.0.5:8443"]}))
    await store.put((Kind.GATEWAY, "b", "gw-1"), GatewaySpec(address="10.9.0.1:7443"))
    for index, (network, via, port) in enumerate((("b", "a", 50001), ("b", "c", 50002), ("a", "b", 60000))):
        spec = AllocationSpec(via=via, turn="turn-1", port=port, gateway="gw-1")
        await store.put((Kind.ALLOCATION, network, f"al-{index}"), spec)


async def test_the_page_is_complete_without_its_script(serve: Any, tokens: Any) -> None:
    async with serve(tokens_file=tokens.path) as at:
        await fill(at.store)
        async with at.session.get(f"{at.url}/") as answer:
            assert answer.status == 401
            assert answer.headers["WWW-Authenticate"].startswith("Basic ")
        for name, endpoints in (("operator", "1"), ("b", "1"), ("c", "0")):
            basic = {"Authorization": "Basic " + base64.b64encode(f":{tokens[name]}".encode()).decode()}
            async with at.session.get(f"{at.url}/", headers=basic) as answer:
                assert answer.status == 200
                assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
                html = await answer.text()
            text = " ".join(Text(html).text.split())
            assert f"b orders.shop 8443 {endpoints}" in text
            assert "b a turn-1 50001 gw-1 0 s usable" in text
            assert "b c turn-1 50002 gw-1 0 s no relay there" in text
            assert "a b turn-1 60000 gw-1 0 s port outside the TURN server's range" in text
            assert ">10.1.0.5" not in html
        async with at.session.get(f"{at.url}/?network=c", headers=basic) as answer:
            text = " ".join(Text(await answer.text()).text.split())
        assert "50002" in text
        assert "50001" not in text
        for path in ("page.css", "page.js"):
            async with at.session.get(f"{at.url}/{path}") as answer:
                assert answer.status == 200


def test_the_page_of_a_thousand_networks_is_limited() -> None:
    records = [
        Record(kind=Kind.NETWORK, network=f"n{n}", id=f"n{n}", revision=n, spec=NetworkSpec()) for n in range(1000)
    ]
    html = render_page(Mesh.of(records), STATE, None)
    assert html.count("<circle") == MAX_NODES
    assert html.count("<tr>") == MAX_ROWS + 1
    assert "choose a network" in html
    assert len(html) < 100_000
    Text(html)


def test_records_are_escaped() -> None:
    evil = '"><script>alert(1)</script>'
    record = Record(kind=Kind.RELAY, network=evil, id=evil, revision=1, spec=RelaySpec(addresses=[evil], ports=[1]))
    html = render_page(Mesh.of([record]), STATE, evil)
    assert "<script>" not in html


def test_a_server_that_is_cut_off_says_so() -> None:
    state = PageState(epoch="e", revision=7, stale_s=90, reader="x", ages={})
    assert "cut off from its store for 2 min" in render_page(Mesh.EMPTY, state, "unknown")
    assert [age_text(age) for age in (None, 5, 7200, 200_000)] == ["since before this server", "5 s", "2 h", "2 d"]


class Browser:
    """One page of a headless Chromium, controlled by its DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._last = 0

    async def do(self, method: str, **params: Any) -> Any:
        self._last += 1
        await self._socket.send_json({"id": self._last, "method": method, "params": params})
        while (message := await self._socket.receive_json()).get("id") != self._last:
            pass
        assert "error" not in message, message
        return message["result"]

    async def value(self, expression: str) -> Any:
        return (await self.do("Runtime.evaluate", expression=expression))["result"].get("value")

    async def until(self, expression: str) -> None:
        await eventually(lambda: self.value(expression))

    async def open(self, url: str) -> None:
        await self.do("Page.navigate", url=url)
        await self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    async def press(self, key: str, code: int) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            await self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)


@contextlib.asynccontextmanager
async def chromium(folder: Path) -> AsyncIterator[Browser]:
    """Run a browser with its own profile. All its processes end with the block."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}", "--remote-debugging-port=0"]
    command += ["--window-size=1100,1500", "about:blank"]
    process = subprocess.Popen(  # noqa: ASYNC220 - killed with its whole group, which asyncio cannot
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        told = folder / "profile" / "DevToolsActivePort"
        await eventually(lambda: told.exists() and len(told.read_text().splitlines()) >= 2, 30)
        async with asyncio.timeout(30):
            address = f"http://127.0.0.1:{told.read_text().splitlines()[0]}/json"
            async with aiohttp.ClientSession() as session:
                async with session.get(address) as answer:
                    targets = await answer.json()
                page = next(target for target in targets if target["type"] == "page")
                async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    yield Browser(socket)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.interop
@pytest.mark.needs("chromium")
async def test_a_real_browser_live_by_keyboard_and_without_script(serve: Any, tmp_path: Path) -> None:
    async with serve() as at:
        await fill(at.store)
        async with chromium(tmp_path) as browser:
            await browser.open(f"{at.url}/")
            await browser.until("document.getElementById('status').textContent === 'Live.'")
            assert await browser.value("document.querySelectorAll('svg circle').length") == 3

            # By keyboard: the first link leads to the tables, and a node of the graph to its network.
            await browser.press("Tab", 9)
            assert await browser.value("document.activeElement.className") == "skip"
            await browser.value("document.querySelector('svg a[href=\"/?network=b\"]').focus()")

            # A change appears by itself, and the focus stays on the same link.
            await at.store.put((Kind.RELAY, "c", "appeared"), RelaySpec(addresses=["10.0.0.10"], ports=[443]))
            await at.store.delete((Kind.GATEWAY, "b", "gw-1"))
            await browser.until("document.body.textContent.includes('appeared')")
            assert not await browser.value("document.body.textContent.includes('10.9.0.1:7443')")
            assert await browser.value("document.activeElement.getAttribute('href')") == "/?network=b"
            picture = base64.b64decode((await browser.do("Page.captureScreenshot"))["data"])
            (tmp_path / "page.png").write_bytes(picture)  # kept in the tests' temporary folder, for people
            assert picture.startswith(b"\x89PNG")
            await browser.press("Enter", 13)
            await browser.until("location.search === '?network=b' && document.readyState === 'complete'")

            await browser.do("Emulation.setScriptExecutionDisabled", value=True)
            await browser.open(f"{at.url}/?network=c")
            text = await browser.value("document.body.textContent")
            assert "appeared" in text
            assert "As of when the page was loaded" in text
