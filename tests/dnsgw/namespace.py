"""A network namespace in which our server is 127.0.0.1:53, as /etc/resolv.conf tells the programs in it.

Run as a program it is the inside: it makes upstream (127.0.0.2:53) and the server, says "ready", and then answers each
line of standard input with one line of JSON, until there are no more. `Namespace` is the outside.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self

import uvloop

from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import Mesh
from dnsgw import DnsConfig, DnsServer
from tests.support.dns_authority import Authority, serving
from tests.support.dns_meshes import DOMAIN, mesh, relay, service

CLUSTER = "svc.cluster.local"
RESOLV_CONF = f"""\
nameserver 127.0.0.1
search shop.{CLUSTER} {CLUSTER} cluster.local
options ndots:5 timeout:1 attempts:2
"""
NSSWITCH_CONF = "hosts: files dns\n"
RECORDS = {
    ("www.example.test", "A"): ["192.0.2.1"],
    ("www.example.test", "AAAA"): ["2001:db8::1"],
    ("v4.example.test", "A"): ["192.0.2.2"],
    ("alias.example.test", "CNAME"): ["v4.example.test"],
    ("big.example.test", "A"): [f"192.0.2.{n}" for n in range(1, 61)],
    (f"cart.shop.{CLUSTER}", "A"): ["192.0.2.7"],
    (f"six.shop.{CLUSTER}", "AAAA"): ["2001:db8::7"],
}
"""What upstream has. The names in the cluster are offered by network b too; upstream goes first."""


def view(*, alive: bool) -> Mesh:
    offered = [service("b", f"{name}.shop.{CLUSTER}", 8443) for name in ("cart", "six")]
    return mesh(*([relay("10.0.0.9")] if alive else [])).apply(offered)


class Namespace:
    """The namespace, for as long as its context lasts. `directory` must be one that only root can write to."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._inside: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        command = ["unshare", "--net", "--mount", "--", sys.executable, "-m", __name__, str(self._directory)]
        root = Path(__file__).parents[2]
        self._inside = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, bufsize=1
        )
        assert self._answer() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._inside is not None
        assert self._inside.stdin is not None
        self._inside.stdin.close()
        assert self._inside.wait(10) == 0
        if self._inside.stdout is not None:
            self._inside.stdout.close()

    def tell(self, **command: Any) -> Any:
        """Give the inside a command and return what it answers."""
        assert self._inside is not None
        assert self._inside.stdin is not None
        self._inside.stdin.write(json.dumps(command) + "\n")
        return self._answer()

    def run(self, *command: str) -> str:
        """Run a program in the namespace and return its output."""
        assert self._inside is not None
        enter = ["nsenter", "--target", str(self._inside.pid), "--net", "--mount", "--"]
        done = subprocess.run([*enter, *command], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _answer(self) -> Any:
        assert self._inside is not None
        assert self._inside.stdout is not None
        line = self._inside.stdout.readline()
        assert line, f"the inside ended with {self._inside.wait(10)}"
        return json.loads(line)


def _prepare(directory: Path) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for name, text in (("resolv.conf", RESOLV_CONF), ("nsswitch.conf", NSSWITCH_CONF)):
        (directory / name).write_text(text)
        os.chmod(directory / name, 0o644)
        subprocess.run(["mount", "--bind", str(directory / name), f"/etc/{name}"], check=True)


async def _commands(server: DnsServer, upstream: Authority) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    before: dict[str, int] = {}
    print('"ready"', flush=True)
    while line := await reader.readline():
        command = json.loads(line)
        if "alive" in command:
            server.apply(view(alive=command["alive"]))
        after = {outcome.value: count for outcome, count in server.metrics.queries.items()}
        asked: Sequence[str] = [f"{asked.name} {asked.rdtype}" for asked in upstream.asked]
        upstream.asked.clear()
        counts = {outcome: count - before.get(outcome, 0) for outcome, count in after.items()}
        before = after
        print(json.dumps({"counts": {o: n for o, n in counts.items() if n}, "upstream": asked}), flush=True)


async def _inside(directory: Path) -> None:
    _prepare(directory)
    rule = ImportRule(names=(f"*.shop.{CLUSTER}",), sources=("b",))
    async with serving(dict(RECORDS), "127.0.0.2", 53) as upstream:
        server = DnsServer(
            DnsConfig(
                network="a",
                domain=DOMAIN,
                listen=((ip_address("127.0.0.1"), 53),),
                upstream=((ip_address("127.0.0.2"), 53),),
                imports=Imports([rule]),
            )
        )
        await server.open()
        server.apply(view(alive=True))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.run())
            await _commands(server, upstream)
            await server.close()


if __name__ == "__main__":
    uvloop.run(_inside(Path(sys.argv[1])))
