"""A resolver process that asks Debian's BIND, which has cookies: its answers, and the status that it shows."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.dns_servers import free_port
from tests.support.running import Running, running
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.interop, pytest.mark.needs("named", "dig")]

MESH = "networks: [{id: a}]\n"
FILE = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
drain: 0
dns: {{listen: "127.0.0.1:0", search: [], loop_probe: false, upstream: "127.0.0.1:{port}", {dns}}}
"""
ZONE = "@ 60 IN SOA ns admin 1 2 3 4 60\n@ 60 IN NS ns\nns 60 IN A 192.0.2.53\n*.www 60 IN A 192.0.2.1\n"


@contextmanager
def named(folder: Path, options: str) -> Iterator[int]:
    """BIND on loopback with one zone and no control channel."""
    port = free_port()
    (folder / "zone").write_text(ZONE)
    (folder / "named.conf").write_text(
        f"""
options {{
  directory "{folder}"; pid-file none; session-keyfile none; managed-keys-directory "{folder}";
  listen-on port {port} {{ 127.0.0.1; }}; listen-on-v6 {{ none; }};
  recursion no; dnssec-validation no; {options}
}};
controls {{ }};
zone "example.test" {{ type primary; file "zone"; }};
"""
    )
    log = folder / "named.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["named", "-g", "-n", "1", "-c", str(folder / "named.conf")], stderr=output, stdin=subprocess.DEVNULL
        )
    try:

        def runs() -> bool:
            assert process.poll() is None, log.read_text()
            return re.search(r"\d running\n", log.read_text()) is not None

        wait_until(runs, limit_s=20)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def ask(resolver: Running, name: str, *options: str) -> str:
    port = resolver.started()["dns"][0].rpartition(":")[2]
    command = [
        "dig",
        "@127.0.0.1",
        "-p",
        port,
        "+tries=1",
        "+timeout=4",
        "+noall",
        "+comments",
        "+answer",
        *options,
        name,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout


def metric(resolver: Running, name: str) -> float:
    (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", resolver.ask("/metrics")[1], re.MULTILINE)
    return float(value)


@pytest.mark.parametrize("options", ["", "require-server-cookie yes;"], ids=["cookies", "cookies or nothing"])
def test_cookies_case_and_spelling(tmp_path: Path, options: str) -> None:
    (tmp_path / "mesh.yaml").write_text(MESH)
    with named(tmp_path, options) as port, running(tmp_path, FILE.format(port=port, dns="")) as resolver:
        for n in range(5):
            text = ask(resolver, f"N{n}.wWw.example.test")
            assert f"N{n}.wWw.example.test." in text
            assert text.rstrip().endswith("192.0.2.1")
            assert "status: NOERROR" in text
        assert "NXDOMAIN" in ask(resolver, "nope.example.test", "+noedns")
        label = f'{{upstream="127.0.0.1:{port}"}}'
        assert metric(resolver, f"crossnet_dns_upstream_cookies{label}") == 1
        assert metric(resolver, f"crossnet_dns_upstream_random_case{label}") == 1
        wanted = {"asked_again": 1.0 if options else 0.0, "wrong_cookie": 0.0, "misspelled": 0.0, "distrusted": 0.0}
        for outcome, count in wanted.items():
            assert metric(resolver, f'crossnet_dns_upstream_attempts_total{{outcome="{outcome}"}}') == count
        (known,) = json.loads(resolver.ask("/status")[1])["upstreams"]
        assert known == {
            "upstream": f"127.0.0.1:{port}",
            "random_case": "on",
            "cookies": True,
            "edns": True,
            "answers": True,
            "loop": False,
        }
        admin = resolver.started()["admin"][0]
        command = [sys.executable, "-m", "crossnet", "status", "--admin", admin]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        assert re.search(rf"127\.0\.0\.1:{port} +on +yes +yes", shown)


def test_without_cookies_and_random_case(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(MESH)
    dns = "random_case: false"
    with (
        named(tmp_path, "answer-cookie no;") as port,
        running(tmp_path, FILE.format(port=port, dns=dns)) as resolver,
    ):
        for n in range(3):
            assert ask(resolver, f"n{n}.www.example.test").rstrip().endswith("192.0.2.1")
        (known,) = json.loads(resolver.ask("/status")[1])["upstreams"]
        assert (known["random_case"], known["cookies"]) == ("off", False)
        # A changed file can turn on random case.
        (tmp_path / "crossnet.yaml").write_text(FILE.format(port=port, dns="random_case: true"))
        assert resolver.wait_for("config_read")["applied"] == ["dns.random_case"]
        assert ask(resolver, "n9.www.example.test").rstrip().endswith("192.0.2.1")
        (known,) = json.loads(resolver.ask("/status")[1])["upstreams"]
        assert known["random_case"] == "on"


@pytest.mark.parametrize(("name", "status"), [("n1.www", "NOERROR"), ("ns AAAA", "NOERROR"), ("nope", "NXDOMAIN")])
def test_an_authoritative_upstream_is_a_recursive_one_to_clients(tmp_path: Path, name: str, status: str) -> None:
    """BIND says AA and no RA for its own zone, as CoreDNS does: glibc would take that for a failure, and nslookup go on."""
    (tmp_path / "mesh.yaml").write_text(MESH)
    host, *qtype = name.split()
    with named(tmp_path, "") as port, running(tmp_path, FILE.format(port=port, dns="")) as resolver:
        for _ in range(3):
            text = ask(resolver, f"{host}.example.test", *qtype)
            assert f"status: {status}" in text
            assert "flags: qr rd ra;" in text, text
