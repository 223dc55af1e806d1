"""Two hosts with one link between them, each a network namespace, and a link that starts to drop all packets."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.hosts import Namespace

HERE, THERE = "198.18.7.1", "198.18.7.2"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=10)


@contextmanager
def two_hosts() -> Iterator[tuple[Namespace, Namespace]]:
    """Have the two hosts while the block runs."""
    here, there = Namespace(), Namespace()
    try:
        with here.entered():
            _run("ip", "link", "add", "here0", "type", "veth", "peer", "name", "there0")
            _run("ip", "link", "set", "there0", "netns", f"/proc/{os.getpid()}/fd/{there.fd}")
        for host, link, address in ((here, "here0", HERE), (there, "there0", THERE)):
            with host.entered():
                _run("ip", "address", "add", f"{address}/24", "dev", link)
                _run("ip", "link", "set", link, "up")
                _run("ip", "link", "set", "lo", "up")
        yield here, there
    finally:
        here.close()
        there.close()


RULES = {
    "both": "add rule ip t in drop; add rule ip t out drop",
    "ours": "add rule ip t in drop",
    "theirs": "add rule ip t out drop",
}


def blackhole(host: Namespace, lost: str) -> None:
    """Drop, at this host, what comes in ("ours"), what goes out ("theirs"), or both."""
    with host.entered():
        _run(
            "nft",
            "add table ip t; add chain ip t in { type filter hook input priority 0; };"
            f"add chain ip t out {{ type filter hook output priority 0; }}; {RULES[lost]}",
        )
