"""The configuration of a server: what it refuses to be."""

from pathlib import Path

import pytest

from discovery.api import DiscoveryServer
from discovery.server_config import DiscoveryServerConfig, ServerRefused, make_store, start_refusals
from discovery.store import MemoryStore, SqliteStore, StoreError

LOOPBACK = (("127.0.0.1", 8600), ("::1", 8600))
PUBLIC = (*LOOPBACK, ("0.0.0.0", 8600))
FILE = Path("x")


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        (DiscoveryServerConfig(listen=LOOPBACK), 0),
        (DiscoveryServerConfig(listen=PUBLIC), 2),
        (DiscoveryServerConfig(listen=PUBLIC, tls_cert=FILE), 1),
        (DiscoveryServerConfig(listen=PUBLIC, tokens_file=FILE), 1),
        (DiscoveryServerConfig(listen=PUBLIC, tls_cert=FILE, tokens_file=FILE), 0),
        (DiscoveryServerConfig(listen=PUBLIC, insecure=True), 0),
        (DiscoveryServerConfig(listen=(("10.0.0.2", 8600),)), 2),
        (DiscoveryServerConfig(listen=(("::", 8600),)), 2),
    ],
)
def test_nothing_is_served_openly_by_mistake(config: DiscoveryServerConfig, reasons: int) -> None:
    assert len(start_refusals(config)) == reasons
    assert all("insecure: true" in reason for reason in start_refusals(config))


@pytest.mark.anyio
async def test_a_server_that_refuses_opens_no_store() -> None:
    server = DiscoveryServer(DiscoveryServerConfig(listen=PUBLIC, store="sqlite:/nowhere/discovery.db"))
    with pytest.raises(ServerRefused) as caught:
        async with server.serving():
            pass
    assert len(caught.value.reasons) == 2


def test_stores() -> None:
    assert isinstance(make_store("memory"), MemoryStore)
    assert isinstance(make_store("sqlite:discovery.db"), SqliteStore)
    for bad in ("", "sqlite", "sqlite:", "etcd:x", "memory:x"):
        with pytest.raises(StoreError, match="expected memory or sqlite:PATH"):
            make_store(bad)


def test_secrets_are_not_shown() -> None:
    config = DiscoveryServerConfig(listen=LOOPBACK, turn_secrets={"d": "s3cret"})
    assert "s3cret" not in repr(config)
