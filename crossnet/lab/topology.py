"""The networks of the lab: two network namespaces, or addresses of the loopback interface.

    network a (namespace)            the lab's own namespace            network b (namespace)
    10.80.0.1   clients       ──── 10.80.0.254  router  10.90.0.254 ──── 10.90.0.2  gateway
    10.80.0.10  relay              masquerades b → a,                    10.90.0.5  service
    10.80.0.20  TURN server        drops a → b
    10.80.0.30  discovery
    10.80.0.53  dnsgw

The lab runs in a network and mount namespace that `enter.py` made. All names, links and mounts are private to it, so
that the kernel takes everything away with the last process, however that one ends.
"""

import os
import random
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Network = Literal["a", "b"]

COMMAND_TIMEOUT_S = 10.0
HTTPS_PORT = 443
DNS_PORT = 53

FIREWALL = """
table inet crossnet_lab {
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        iifname "to-b" oifname "to-a" accept
        iifname "to-a" oifname "to-b" counter drop comment "from a into b"
    }
}
table ip crossnet_lab_nat {
    chain postrouting {
        type nat hook postrouting priority srcnat;
        iifname "to-b" oifname "to-a" masquerade
    }
}
"""


class TopologyError(Exception):
    """This machine does not allow something that the topology needs; the text says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Addresses and ports of the parts."""

    client: str
    relay: str
    turn: str
    discovery: str
    dns: str
    gateway: str
    service: str
    router: str | None
    """Address of the router between the networks, from which network a sees network b's gateway; None: there is none."""
    relay_port: int = HTTPS_PORT
    dns_port: int = DNS_PORT
    turn_port: int = 3478
    discovery_port: int = 8600
    service_port: int = 8443
    turn_ports: tuple[int, int] = (49160, 49960)
    admin_ports: dict[str, int] = field(
        default_factory=lambda: {"discovery": 8691, "turn": 8692, "dns": 8693, "relay": 8694, "gateway": 8695}
    )

    def admin(self, part: str) -> tuple[str, int]:
        """Return where a part's admin server listens: in its own network, for the lab to read."""
        where = {"discovery": self.discovery, "turn": self.turn, "dns": self.dns, "relay": self.relay}
        return where.get(part, self.gateway), self.admin_ports[part]


class Namespaces:
    """Two network namespaces and a router between them, which is this process's own namespace."""

    mode = "namespaces"

    def __init__(self, folder: Path, run_id: str) -> None:
        self._folder = folder
        self._names: dict[Network, str] = {"a": f"crossnet-{run_id}-a", "b": f"crossnet-{run_id}-b"}
        self._mounts = ""
        self.plan = Plan(
            client="10.80.0.1",
            relay="10.80.0.10",
            turn="10.80.0.20",
            discovery="10.80.0.30",
            dns="10.80.0.53",
            gateway="10.90.0.2",
            service="10.90.0.5",
            router="10.80.0.254",
        )

    def build(self) -> None:
        """Build the networks. Raises TopologyError if the kernel forbids it or a program is missing."""
        plan = self.plan
        mounts = self._resolver_files()
        _do("ip", "link", "set", "lo", "up")
        _do("mount", "-t", "tmpfs", "tmpfs", "/run")
        for target in mounts.values():
            if target.is_relative_to("/run"):  # hidden by our tmpfs
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch()
        _ip(*(f"netns add {name}" for name in self._names.values()))
        self._connect("a", [plan.client, plan.relay, plan.turn, plan.discovery, plan.dns])
        self._connect("b", [plan.gateway, plan.service])
        try:
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        except OSError as error:
            raise TopologyError(f"/proc/sys/net/ipv4/ip_forward: {error.strerror}") from error
        _do("nft", "-f", "-", given=FIREWALL)
        self._mounts = "".join(f"mount --bind {source} {target} && " for source, target in mounts.items())
        _do(*self.command("a", ["true"]))

    def command(self, network: Network, arguments: Sequence[str]) -> list[str]:
        """Return the command that runs `arguments` in a network. It replaces itself with them, so the pid stays the same."""
        script = f'{self._mounts if network == "a" else ""}exec "$@"'
        return ["ip", "netns", "exec", self._names[network], "sh", "-c", script, "sh", *arguments]

    def dropped(self) -> int | None:
        """Return how many packets from a into b the firewall has dropped."""
        words = _do("nft", "list", "chain", "inet", "crossnet_lab", "forward").split()
        return int(words[words.index("packets") + 1])

    def _connect(self, network: Network, addresses: Sequence[str]) -> None:
        name, link = self._names[network], f"to-{network}"
        router = addresses[0].rpartition(".")[0] + ".254"
        _ip(
            f"link add {link} type veth peer name eth0 netns {name}",
            f"address add {router}/24 dev {link}",
            f"link set {link} up",
        )
        _ip(
            "link set lo up",
            *(f"address add {address}/24 dev eth0" for address in addresses),
            "link set eth0 up",
            f"route add default via {router}",
            namespace=name,
        )

    def _resolver_files(self) -> dict[Path, Path]:
        """Write files for the clients' resolver, and return where to mount them. The host's files are not changed."""
        found = {}
        for target, content in (
            ("/etc/resolv.conf", f"nameserver {self.plan.dns}\noptions timeout:2 attempts:2\n"),
            # The host may use systemd-resolved or a cache instead of the name servers.
            ("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
        ):
            place = Path(os.path.realpath(target))
            if place.is_relative_to("/run") or place.exists():
                source = self._folder / place.name
                source.write_text(content)
                source.chmod(0o644)
                found[source] = place
        if not found:
            raise TopologyError("there is no /etc/resolv.conf to mount over")
        return found


class Loopback:
    """Addresses of the loopback interface, for when the kernel forbids namespaces. Nothing is isolated."""

    mode = "loopback"

    def __init__(self) -> None:
        block = f"127.{random.randrange(64, 128)}.{random.randrange(1, 255)}"
        relay, dns = f"{block}.10", f"{block}.53"
        self.plan = Plan(
            client="127.0.0.1",
            relay=relay,
            turn=f"{block}.20",
            discovery=f"{block}.30",
            dns=dns,
            gateway=f"{block}.102",
            service=f"{block}.105",
            router=None,
            relay_port=HTTPS_PORT if _may_bind(relay, HTTPS_PORT) else 8443,
            dns_port=DNS_PORT if _may_bind(dns, DNS_PORT) else 5353,
        )

    def build(self) -> None:
        """Check that the addresses can be used, as on Linux without configuration. Raises TopologyError."""
        if not _may_bind(self.plan.relay, 0):
            raise TopologyError(f"{self.plan.relay} is not an address of this machine's loopback interface")

    def command(self, network: Network, arguments: Sequence[str]) -> list[str]:
        """Return the command itself: both networks are this machine."""
        del network
        return list(arguments)

    def dropped(self) -> int | None:
        """Return None: there is no firewall."""
        return None


Topology = Namespaces | Loopback


def _may_bind(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def _ip(*lines: str, namespace: str | None = None) -> None:
    _do("ip", *(["-n", namespace] if namespace else []), "-batch", "-", given="\n".join(lines) + "\n")


def _do(*command: str, given: str | None = None) -> str:
    """Run a short command and return its output. Raises TopologyError with its error message."""
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TopologyError(f"{' '.join(command[:3])}: {error}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise TopologyError(f"{' '.join(command[:4])}: {said}")
    return done.stdout
