"""A resolver under a new configuration: a real process, dig, and two real upstreams with different answers."""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from crossnet.app import role_configs
from crossnet.app.app import App
from crossnet.app.role import FORGET_S
from crossnet.app.roles.relay import RelayRole
from crossnet.config.file import ConfigError, load
from crossnet.config.file_values import MAX_CERTIFICATES_BYTES
from crossnet.config.reload import change, files
from tests.support.dns_servers import free_port
from tests.support.running import Running, running

pytestmark = pytest.mark.needs("dig", "dnsmasq")

ORDERS = "orders.shop.svc.cluster.local"
OWN = "p8443-10-1-0-5.b.svc.mesh.internal"
MESH = f"""
networks: [{{id: a}}, {{id: b}}]
services: [{{name: {ORDERS}, network: b, ports: {{8443: ["10.1.0.5:8443"]}}}}]
relays: [{{network: a, id: relay-1, addresses: ["10.0.0.9"], ports: [443]}}]
"""
FILE = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
drain: 0
dns: {{listen: "{listen}", search: [], loop_probe: false, {dns}}}
"""


@contextlib.contextmanager
def upstream(address: str) -> Iterator[int]:
    """A server that has this one address for every name, for 300 s."""
    port = free_port()
    process = subprocess.Popen(
        [
            *(
                "dnsmasq",
                "--keep-in-foreground",
                "--conf-file=/dev/null",
                f"--port={port}",
                "--listen-address=127.0.0.1",
            ),
            *("--bind-interfaces", "--no-resolv", "--no-hosts", "--pid-file", "--user=root", f"--address=/#/{address}"),
            "--local-ttl=300",
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        yield port
    finally:
        process.terminate()
        process.wait(10)


def dig(resolver: Running, name: str, *options: str) -> str:
    """Ask; return the answer's TTL and data, or the response code if there is no answer."""
    port = resolver.started()["dns"][0].rpartition(":")[2]
    asked = [
        "dig",
        "@127.0.0.1",
        "-p",
        port,
        "+tries=5",
        "+timeout=1",
        "+noall",
        "+comments",
        "+answer",
        *options,
        name,
    ]
    lines = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30).stdout.splitlines()
    records = [line.split() for line in lines if line and not line.startswith(";")]
    if records:
        return f"{records[0][1]} {records[0][-1]}"
    return next(line.split("status: ")[1].split(",")[0] for line in lines if "status: " in line)


def write(folder: Path, dns: str, listen: str = "127.0.0.1:0", more: str = "") -> None:
    (folder / "new").write_text(FILE.format(dns=dns, listen=listen) + more)
    os.replace(folder / "new", folder / "crossnet.yaml")


def test_a_resolver_goes_by_a_new_file_at_once(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(MESH)
    with upstream("192.0.2.1") as one, upstream("192.0.2.2") as two:
        first = f'upstream: "127.0.0.1:{one}"'
        with running(tmp_path, FILE.format(dns=first, listen="127.0.0.1:0")) as resolver:
            for _ in range(2):
                assert dig(resolver, "www.example.test").endswith(" 192.0.2.1")
            assert dig(resolver, OWN) == "5 10.0.0.9"
            assert dig(resolver, ORDERS).endswith(" 192.0.2.1")

            # Upstreams, TTL and imports by SIGHUP; answers of the former upstream do not count any more.
            second = f'upstream: "127.0.0.1:{two}", ttl: 9s, forward: {{corp.test: "127.0.0.1:{one}"}}'
            imports = f'import: [{{names: ["{ORDERS}"], from: [b], prefer: remote}}]\n'
            write(tmp_path, second, more=imports)
            resolver.process.send_signal(signal.SIGHUP)
            read = resolver.wait_for("config_read")
            assert set(read["applied"]) == {"import", "dns.upstream", "dns.forward", "dns.ttl"}
            assert read["restart_needed"] == []
            assert dig(resolver, "www.example.test").endswith(" 192.0.2.2")
            assert dig(resolver, "wiki.corp.test").endswith(" 192.0.2.1")
            assert [dig(resolver, name) for name in (OWN, ORDERS)] == ["9 10.0.0.9"] * 2

            # Who may ask, by the change of the file alone.
            write(tmp_path, second + ", allow: [127.0.0.2/32], rate_limit: 3", more=imports)
            assert set(resolver.wait_for("config_read", 2)["applied"]) == {"dns.allow", "dns.rate_limit"}
            assert dig(resolver, OWN) == dig(resolver, "www.example.test") == "REFUSED"
            assert dig(resolver, OWN, "-b", "127.0.0.2") == "9 10.0.0.9"

            # An upstream that is the resolver itself, or invalid certificates: nothing changes.
            port = resolver.started()["dns"][0].rpartition(":")[2]
            (tmp_path / "ca.pem").write_text("none\n")
            refused = {
                f'upstream: "127.0.0.1:{port}"': "itself",
                "upstream: tls://127.0.0.1, upstream_ca: ca.pem": "certificate",
            }
            for count, (section, why) in enumerate(refused.items(), 1):
                write(tmp_path, section, more=imports)
                resolver.process.send_signal(signal.SIGHUP)
                resolver.wait_for("config_refused", count)
                fault = resolver.wait_for("config_fault", count)["fault"]
                assert fault.startswith("$.dns: ")
                assert why in fault
                assert dig(resolver, "www.example.test", "-b", "127.0.0.2").endswith(" 192.0.2.2")
                assert dig(resolver, OWN) == "REFUSED"

            # Back to the first file, except for the listening address, which takes a restart.
            write(tmp_path, first, listen=f"127.0.0.1:{free_port()}")
            resolver.process.send_signal(signal.SIGHUP)
            read = resolver.wait_for("config_read", 3)
            assert read["restart_needed"] == ["dns.listen"]
            assert set(read["applied"]) == {
                *("import", "dns.upstream", "dns.forward", "dns.ttl", "dns.allow", "dns.rate_limit"),
            }
            assert dig(resolver, "www.example.test").endswith(" 192.0.2.1")
            assert dig(resolver, OWN) == "5 10.0.0.9"
            assert resolver.end() == 143


def test_another_content_of_a_file_of_certificates_is_a_change(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(MESH)
    (tmp_path / "ca.pem").write_bytes("# Süd\none\n".encode())
    write(tmp_path, "upstream: tls://10.0.0.10, upstream_ca: ca.pem")
    before = load(tmp_path / "crossnet.yaml")
    assert change(before, load(tmp_path / "crossnet.yaml")).applied == ()
    assert tmp_path / "ca.pem" in files(before)  # so that it is watched
    (tmp_path / "ca.pem").write_text("two\n")
    made = change(before, load(tmp_path / "crossnet.yaml"))
    assert (made.applied, made.restart) == (("dns.upstream_ca",), ())
    assert made.config.dns is not None
    assert role_configs.dns_config(made.config, made.config.dns).upstream_ca == "two\n"


def test_a_file_of_certificates_has_an_end(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(MESH)
    with (tmp_path / "ca.pem").open("wb") as file:
        file.truncate(MAX_CERTIFICATES_BYTES + 1)
    write(tmp_path, "upstream: tls://10.0.0.10, upstream_ca: ca.pem")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "crossnet.yaml")
    assert [fault.path for fault in caught.value.faults] == ["$.dns.upstream_ca"]


def test_a_draining_relay_waits_for_answers_with_the_ttl_of_before(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(MESH)
    loaded = {}
    for ttl_s in (5, 60, 30):
        write(tmp_path, f"upstream: 10.0.0.10, ttl: {ttl_s}s")
        loaded[ttl_s] = load(tmp_path / "crossnet.yaml")

    async def reload() -> None:
        app = App(loaded[5], ["relay"])
        role = app.roles["relay"]
        assert isinstance(role, RelayRole)
        begin = asyncio.get_running_loop().time()
        for ttl_s, remembered_s in ((60, 60), (30, 60), (5, 60), (30, 60), (60, 60)):
            role.note_ttl(app.config, loaded[ttl_s])
            app.config = loaded[ttl_s]
            end = asyncio.get_running_loop().time()
            until = role.named_until(end)
            assert begin + remembered_s + FORGET_S <= until <= end + remembered_s + FORGET_S
            assert role.named_until(end + 100) == end + 100 + ttl_s + FORGET_S

    asyncio.run(reload())
