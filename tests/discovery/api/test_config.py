"""The configuration of a server, and which ones it refuses."""

from pathlib import Path
from typing import Any

import pytest

from discovery.api import DiscoveryServer
from discovery.api.config import DiscoveryServerConfig, ServerRefused, make_store, start_refusals
from discovery.store import EtcdStore, MemoryStore, SqliteStore, Store, StoreError

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
def test_serving_openly_must_be_configured(config: DiscoveryServerConfig, reasons: int) -> None:
    assert len(start_refusals(config)) == reasons
    assert all("insecure: true" in reason for reason in start_refusals(config))


@pytest.mark.anyio
async def test_a_refused_configuration_opens_no_store() -> None:
    server = DiscoveryServer(DiscoveryServerConfig(listen=PUBLIC, store="sqlite:/nowhere/discovery.db"))
    with pytest.raises(ServerRefused) as caught:
        async with server.serving():
            pass
    assert len(caught.value.reasons) == 2


def stored(text: str, **settings: Any) -> Store:
    return make_store(DiscoveryServerConfig(listen=LOOPBACK, store=text, **settings))


def test_stores() -> None:
    assert isinstance(stored("memory"), MemoryStore)
    assert isinstance(stored("sqlite:discovery.db"), SqliteStore)
    assert isinstance(stored("etcd:http://10.0.0.2:2379,http://10.0.0.3:2379"), EtcdStore)
    for bad in ("", "sqlite", "sqlite:", "memory:x", "etcd"):
        with pytest.raises(StoreError, match="expected memory, sqlite:PATH or etcd:URL"):
            stored(bad)
    for bad in ("etcd:x", "etcd:", "etcd:http://10.0.0.2:2379,ftp://x:1", "etcd:http://u@h:1", "etcd:http://h:1/x"):
        with pytest.raises(StoreError, match="expected http"):
            stored(bad)
    with pytest.raises(StoreError, match="etcd: "):
        stored("etcd:https://10.0.0.2:2379", etcd_ca=Path("/nowhere/ca.pem"))


def test_secrets_are_not_in_repr() -> None:
    config = DiscoveryServerConfig(listen=LOOPBACK, turn_secrets={"d": "s3cret"})
    assert "s3cret" not in repr(config)
