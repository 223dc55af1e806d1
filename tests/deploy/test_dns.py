"""Every snippet that configures another program to use the resolver, loaded into that program where it is installed.

There is no CoreDNS to be had from Debian, PyPI or npm: its files are read by its grammar and by what its plugins take
(corefile.py), and no more is proven of them.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dns.message
import pytest
import yaml

from crossnet.config.file import load
from tests.deploy import corefile
from tests.support.dns_authority import serving
from tests.support.dns_meshes import DOMAIN, mesh, relay
from tests.support.dns_packets import query
from tests.support.dns_servers import Client, address, free_port, running
from tests.support.waiting import eventually

DEPLOY = Path(__file__).parents[2] / "deploy"
ADDRESS = f"p8443-10-1-0-5.b.{DOMAIN}"


@pytest.mark.anyio
@pytest.mark.needs("dnsmasq")
async def test_dnsmasq_forwards_the_mesh_domain_to_us(tmp_path: Path) -> None:
    text = (DEPLOY / "dnsmasq" / "crossnet.conf").read_text()
    async with (
        serving({("www.example.test", "A"): ["198.41.0.4"]}) as upstream,
        running(mesh(relay("10.0.0.9")), upstream.port) as server,
    ):
        conf = tmp_path / "crossnet.conf"
        conf.write_text(text.replace("127.0.0.1#5300", f"127.0.0.1#{address(server)[1]}"))
        port = free_port()
        process = await asyncio.create_subprocess_exec(
            *("dnsmasq", "--keep-in-foreground", f"--conf-file={conf}", f"--port={port}", "--listen-address=127.0.0.1"),
            *("--bind-interfaces", "--no-resolv", "--no-hosts", "--stop-dns-rebind", "--pid-file", "--user=root"),
            f"--server=127.0.0.1#{upstream.port}",
            stderr=subprocess.DEVNULL,
        )
        try:
            with Client(("127.0.0.1", port)) as client:
                assert await asked(client, ADDRESS) == ["10.0.0.9"]
                assert await asked(client, "www.example.test") == ["198.41.0.4"]
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


async def asked(client: Client, name: str) -> list[str]:
    """Ask until the server has started and answers."""
    replies: list[bytes] = []

    async def answered() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            replies.append(await client.ask(query(name)))
        return bool(replies)

    await eventually(answered)
    return [str(item) for rrset in dns.message.from_wire(replies[0]).answer for item in rrset]


def documents() -> Iterator[tuple[str, Any]]:
    for path in sorted((*DEPLOY.glob("kubernetes/*.yaml"), *DEPLOY.glob("coredns/*.yaml"))):
        for document in yaml.safe_load_all(path.read_text()):
            yield f"{path.name} {document['kind']} {document['metadata']['name']}", document


@pytest.mark.parametrize("document", [pytest.param(found, id=name) for name, found in documents()])
def test_kubernetes_takes_it(document: dict[str, Any]) -> None:
    """Checked against the schema of Kubernetes' own API, strictly: no unknown field."""
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate(document, validate.latest_version(), strict=True)


def test_the_configurations_in_kubernetes_are_ours(tmp_path: Path) -> None:
    config = next(found for name, found in documents() if "ConfigMap crossnet" in name)
    for name in ("token", "ab-1.key", "ba-1.key"):
        (tmp_path / name).write_text("00" * 32 + "\n")
    for name, text in config["data"].items():
        (tmp_path / name).write_text(text.replace("/secrets", str(tmp_path)))
        assert load(tmp_path / name).roles == (name.removesuffix(".yaml"),)


def test_the_resolver_and_the_relay_are_exposed_to_clients_only() -> None:
    policies = {found["metadata"]["name"]: found["spec"] for name, found in documents() if "NetworkPolicy" in name}
    assert policies["closed"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for name in ("clients-to-relay", "askers-to-dns"):
        (rule,) = policies[name]["ingress"]
        assert all("podSelector" in peer for peer in rule["from"])


COREFILES = {
    "stub-domain.Corefile": [f"{DOMAIN}:53", "orders.shop.svc.cluster.local:53", ".:53"],
    "nodelocaldns.Corefile": [f"{DOMAIN}:53"],
}


@pytest.mark.parametrize(("name", "zones"), COREFILES.items())
def test_corefiles_say_nothing_that_coredns_does_not_take(name: str, zones: list[str]) -> None:
    assert corefile.check((DEPLOY / "coredns" / name).read_text()) == zones


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("force_tcp", "force_tcp yes"),
        ("expire 20s", "expire 20"),
        ("forward .", "forward"),
        ("forward . 10.96.0.53", "forward . 10.96.0.533"),
        ("10.96.0.53 {", "10.96.0.53\n{"),
        ("success 9984 5 1", "success 9984 0"),
        ("denial", "deny"),
        ("errors", "error"),
        ("reload", "reload\nreload"),
        ("}", "} }"),
        (":53 {", ":53{"),
        ("prometheus :9253\n}", "prometheus :9253"),
        (f"{DOMAIN}:53 {{", f"{DOMAIN}:53 {DOMAIN}:53 {{"),
    ],
)
def test_the_reader_of_corefiles_finds_what_is_wrong(text: str, other: str) -> None:
    good = (DEPLOY / "coredns" / "nodelocaldns.Corefile").read_text()
    assert text in good
    with pytest.raises(corefile.BadCorefile):
        corefile.check(good.replace(text, other, 1))


def test_the_stub_domain_of_kube_dns() -> None:
    found = next(found for name, found in documents() if name.startswith("kube-dns"))
    assert json.loads(found["data"]["stubDomains"]) == {DOMAIN: ["10.96.0.53"]}


PLACES = [Path(root, "lib/systemd/systemd-resolved") for root in ("/", "/opt/crossnet-tests/systemd-resolved")]
RESOLVED = next((place for place in PLACES if place.exists()), None)
"""Installed, or unpacked by `.ci/servers`: installing it on this machine would let it take over /etc/resolv.conf."""

RESOLVED_CONFIG = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
drain: 0
import: [{names: ["*.shop.svc.cluster.local"], from: [b], prefer: remote}]
dns: {listen: "127.0.0.1:5300", upstream: 127.0.0.2, search: [], loop_probe: false}
"""
RESOLVED_MESH = """
networks: [{id: a}, {id: b}]
services: [{name: orders.shop.svc.cluster.local, network: b, ports: {8443: ["10.1.0.5:8443"]}}]
relays: [{network: a, id: relay-1, addresses: ["10.0.0.9"], ports: [443]}]
"""
RESOLVED_SCRIPT = """
set -e
# It answers nothing while there is no way to anywhere but loopback.
ip link set lo up
ip link add near type veth peer name far
ip link set far up
ip address add 10.99.0.1/24 dev near
ip link set near up
ip route add default via 10.99.0.2
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/resolved.conf.d
cp {snippet} /run/systemd/resolved.conf.d/
{python} -m crossnet run -c {folder}/dns.yaml dns >/run/crossnet.log 2>&1 &
answered() {{
    tries=0
    until dig +tries=1 +timeout=2 "$@" {address} | grep -q 'status: NOERROR'; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || return
        sleep 0.1
    done
}}
answered @127.0.0.1 -p 5300
if ! getent passwd systemd-resolve >/dev/null; then
    for file in passwd group; do cp /etc/$file /run/$file; done
    echo 'systemd-resolve:x:64992:64992::/:/usr/sbin/nologin' >>/run/passwd
    echo 'systemd-resolve:x:64992:' >>/run/group
    for file in passwd group; do mount --bind /run/$file /etc/$file; done
fi
SYSTEMD_LOG_LEVEL=debug SYSTEMD_LOG_TARGET=console {resolved} >/run/resolved.log 2>&1 &
answered @127.0.0.53
for question in "{address} A" "{address} AAAA" "orders.shop.svc.cluster.local A" "elsewhere.test A"; do
    dig +tries=1 +timeout=5 +noall +comments +answer @127.0.0.53 $question | tr '\n' ' '
    echo
done
cat /run/resolved.log
"""


@pytest.mark.needs("netns", "dig")
@pytest.mark.netns
def test_resolved_asks_us_only_for_the_mesh_domain(tmp_path: Path) -> None:
    """In namespaces of its own. It logs unknown settings of a file and continues."""
    if RESOLVED is None:
        missing = "systemd-resolved is neither installed nor unpacked (.ci/servers)"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    (tmp_path / "dns.yaml").write_text(RESOLVED_CONFIG)
    (tmp_path / "mesh.yaml").write_text(RESOLVED_MESH)
    script = RESOLVED_SCRIPT.format(
        snippet=DEPLOY / "resolved" / "crossnet.conf",
        python=sys.executable,
        folder=tmp_path,
        resolved=RESOLVED,
        address=ADDRESS,
    )
    unshare = ["unshare", "--net", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child", "sh", "-c", script]
    done = subprocess.run(unshare, capture_output=True, text=True, check=False, timeout=50)
    ours, no_data, imported, elsewhere, *log = done.stdout.splitlines()
    for reply in (ours, imported):
        assert "status: NOERROR" in reply, done.stdout
        assert reply.split()[-1] == "10.0.0.9", done.stdout
    assert "status: NOERROR" in no_data
    assert "ANSWER: 0" in no_data
    assert "NOERROR" not in elsewhere  # no other server is configured, and ours is not asked
    for complaint in ("Unknown key", "Failed to parse", "Failed to add", "Invalid"):
        assert not [line for line in log if complaint in line]
