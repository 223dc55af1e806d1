"""The embedded TURN server with third-party clients: coturn's tools, aioice, aiortc."""

import asyncio
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.support.embedded_turn import Embedded, embedded
from tests.support.waiting import eventually
from turnreg.server import Limits

pytestmark = [pytest.mark.interop, pytest.mark.slow]

aioice_turn = pytest.importorskip("aioice.turn")
aioice_stun = pytest.importorskip("aioice.stun")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Embedded]:
    """A server with all features enabled, on this host."""
    issued = trustme.CA().issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    with embedded(
        relay_addresses=("127.0.0.1", "::1"),
        listen_udp=(("127.0.0.1", 0),),
        listen_tls=(("127.0.0.1", 0),),
        tls_cert=tmp_path / "cert.pem",
        tls_key=tmp_path / "key.pem",
        udp_allocations=True,
        active_connect=True,
    ) as running:
        yield running


class TestCoturnTools:
    """With `-T`, the tool makes TCP allocations and an active Connect between two of them; otherwise it sends UDP between two."""

    @pytest.mark.needs("turnutils_uclient")
    @pytest.mark.parametrize(
        ("options", "over"),
        [
            (["-y"], "udp"),  # pairs of ports: EVEN-PORT and RESERVATION-TOKEN
            (["-y", "-c", "-s", "-g", "-x"], "udp"),  # Send indications with DONT-FRAGMENT, IPv6 relayed addresses
            (["-T"], "tcp"),
            (["-T", "-S"], "tls"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else value,
    )
    def test_uclient(self, server: Embedded, options: list[str], over: str) -> None:
        port = {"udp": server.udp, "tcp": (server.address, server.port), "tls": server.tls}[over][1]
        command = ["turnutils_uclient", *options, "-u", "u", "-w", "p", "-p", str(port), "-n", "5", "-m", "2"]
        done = subprocess.run([*command, "127.0.0.1"], capture_output=True, text=True, timeout=30, check=False)
        lost = re.findall(r"Total lost packets (\d+)", done.stdout)
        assert lost, done.stdout[-2000:]
        assert lost[-1] == "0", done.stdout[-2000:]
        assert server.metric("crossnet_turn_bytes_total", direction="to_client") > 0

    @pytest.mark.needs("turnutils_stunclient")
    def test_stunclient(self, server: Embedded) -> None:
        command = ["turnutils_stunclient", "-p", str(server.udp[1]), "127.0.0.1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        assert "UDP reflexive addr: 127.0.0.1:" in done.stdout

    @pytest.mark.needs("turnutils_uclient")
    @pytest.mark.parametrize("over", ["udp", "tcp"])
    @pytest.mark.parametrize(
        ("password", "options", "reason"),
        [
            ("wrong", {}, "wrong_password"),
            ("p", {"limits": Limits(max_allocations_per_account=1)}, "quota"),
            ("p", {"allowed_peers": ()}, "forbidden_peer"),  # the tool's peers are on 127.0.0.1
        ],
        ids=["wrong password", "quota", "denied peer"],
    )
    def test_uclient_is_refused(self, password: str, options: dict[str, Any], reason: str, over: str) -> None:
        kind = ["-y"] if over == "udp" else ["-T"]
        with embedded(listen_udp=(("127.0.0.1", 0),), udp_allocations=True, active_connect=True, **options) as refusing:
            port = refusing.udp[1] if over == "udp" else refusing.port
            command = ["turnutils_uclient", *kind, "-u", "u", "-w", password, "-p", str(port), "-n", "1", "-m", "1"]
            done = subprocess.run([*command, "127.0.0.1"], capture_output=True, text=True, timeout=30, check=False)
            assert done.returncode != 0
            assert refusing.metric("crossnet_turn_refusals_total", reason=reason) > 0
            assert refusing.metric("crossnet_turn_bytes_total", direction="to_client") == 0


class Received(asyncio.DatagramProtocol):
    """Puts received datagrams into a queue."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[bytes, Any]] = asyncio.Queue()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.queue.put_nowait((data, addr))


@pytest.mark.anyio
@pytest.mark.parametrize("over", ["udp", "tcp", "tls"])
async def test_aioice(server: Embedded, over: str) -> None:
    """aioice binds a channel for each peer, refreshes, and deletes its allocation at the end."""
    address = {"udp": server.udp, "tcp": (server.address, server.port), "tls": server.tls}[over]
    loop = asyncio.get_running_loop()
    peer_transport, peer = await loop.create_datagram_endpoint(Received, local_addr=("127.0.0.1", 0))
    options: dict[str, Any] = {"transport": "udp" if over == "udp" else "tcp"}
    if over == "tls":
        import ssl

        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        options["ssl"] = context
    transport, client = await aioice_turn.create_turn_endpoint(
        Received, server_addr=address, username="u", password="p", **options
    )
    relayed = transport.get_extra_info("sockname")
    async with asyncio.timeout(10):
        transport.sendto(b"to the peer", peer_transport.get_extra_info("sockname"))
        assert await peer.queue.get() == (b"to the peer", relayed)
        peer_transport.sendto(b"to the client", relayed)
        assert await client.queue.get() == (b"to the client", peer_transport.get_extra_info("sockname"))
        transport.close()
        await eventually(lambda: not server.metric("crossnet_turn_allocations"), what="the allocation is deleted")
    peer_transport.close()


@pytest.mark.anyio
@pytest.mark.parametrize("over", ["udp", "tcp"])
async def test_aioice_with_a_wrong_password(server: Embedded, over: str) -> None:
    address, transport = (server.udp, "udp") if over == "udp" else ((server.address, server.port), "tcp")
    with pytest.raises(aioice_stun.TransactionFailed, match="401"):
        await aioice_turn.create_turn_endpoint(
            Received, server_addr=address, username="u", password="wrong", transport=transport
        )
    assert server.metric("crossnet_turn_allocations") == 0


@pytest.mark.anyio
async def test_aiortc_by_relay_only(server: Embedded) -> None:
    """Two peers that may use only the TURN server: ICE, DTLS and SCTP through two allocations."""
    aiortc = pytest.importorskip("aiortc")
    url = f"turn:{server.address}:{server.udp[1]}?transport=udp"
    configuration = aiortc.RTCConfiguration(
        iceServers=[aiortc.RTCIceServer(urls=[url], username="u", credential="p")],
        iceTransportPolicy=aiortc.RTCIceTransportPolicy.RELAY,
    )
    caller, callee = aiortc.RTCPeerConnection(configuration), aiortc.RTCPeerConnection(configuration)
    answered: asyncio.Queue[object] = asyncio.Queue()

    @callee.on("datachannel")  # type: ignore[untyped-decorator]
    def opened(channel: Any) -> None:
        channel.on("message", lambda message: channel.send(message.upper()))

    try:
        channel = caller.createDataChannel("test")
        channel.on("open", lambda: channel.send("through the relay"))
        channel.on("message", answered.put_nowait)
        async with asyncio.timeout(30):
            await caller.setLocalDescription(await caller.createOffer())
            await callee.setRemoteDescription(caller.localDescription)
            await callee.setLocalDescription(await callee.createAnswer())
            await caller.setRemoteDescription(callee.localDescription)
            assert await answered.get() == "THROUGH THE RELAY"
        assert "typ host" not in caller.localDescription.sdp
        assert server.metric("crossnet_turn_allocations") == 2
        assert server.metric("crossnet_turn_bytes_total", direction="to_client") > 1000
    finally:
        await caller.close()
        await callee.close()
