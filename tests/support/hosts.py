"""Two networks of hosts on this machine: one network namespace per host, with a router between the networks.

    network a                          the router                       network b
    10.80.1.2  client, discovery  ───  10.80.1.1    10.90.1.1  ───  10.90.1.2  gateway
    10.80.2.2  relay              ───  10.80.2.1    10.90.2.1  ───  10.90.2.2  services
    10.80.3.2  TURN server        ───  10.80.3.1    10.90.3.1  ───  10.90.3.2  second gateway
                                                    10.90.4.1  ───  10.90.4.2  hop
                                  masquerades b → a, drops a → b

Every link is a veth pair with an MTU of 1500 and without larger segments (`gso_max_segs 1`), and the router limits each host to
100 Mb/s. This is where data loss in TURN servers shows: on loopback, or on a veth with default settings, one write arrives as one
read, immediately. Only the router drops packets: Linux gives up a connection after its own queue has dropped fifteen packets in a
row (7.5 s), which happens with two hundred streams at full speed.

The namespaces have no names. Each is kept alive by a descriptor of this process and by the processes in it, so the kernel
removes everything with the last of them, however it ends.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from crossnet.lab.topology import FIREWALL, Plan

CLONE_NEWNET = 0x40000000
COMMAND_TIMEOUT_S = 10.0
MASK = 24

SHAPE = ("tbf", "rate", "100mbit", "burst", "4kb", "latency", "50ms")
"""Bursts of two segments, so that one write arrives in several pieces; a queue of 50 ms, as in a router."""

LINKS = {
    "client": "10.80.1.2",
    "relay": "10.80.2.2",
    "turn": "10.80.3.2",
    "gateway": "10.90.1.2",
    "service": "10.90.2.2",
    "gateway-2": "10.90.3.2",
    "hop": "10.90.4.2",
}
"""The hosts and their addresses."""

HOST_OF_PART = {"discovery": "client", "dns": "client"}
MORE_ADDRESSES = {"client": ["10.80.1.3", "10.80.1.53"]}

_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network namespace. `entered()` moves this thread into it and back."""

    def __init__(self) -> None:
        home = _own()
        try:
            _check(_libc.unshare(CLONE_NEWNET), "unshare")
            try:
                self.fd = _own()
            finally:
                _check(_libc.setns(home, CLONE_NEWNET), "setns")
        finally:
            os.close(home)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Enter the namespace while the block runs. The block must not await: other tasks run in the same thread."""
        home = _own()
        try:
            _check(_libc.setns(self.fd, CLONE_NEWNET), "setns")
            try:
                yield
            finally:
                _check(_libc.setns(home, CLONE_NEWNET), "setns")
        finally:
            os.close(home)

    def close(self) -> None:
        """Close its descriptor."""
        os.close(self.fd)


class Hosts:
    """The `Ground` of a mesh whose parts have hosts of their own."""

    def __init__(self) -> None:
        self.plan = Plan(
            client=LINKS["client"],
            relay=LINKS["relay"],
            turn=LINKS["turn"],
            discovery=MORE_ADDRESSES["client"][0],
            dns=MORE_ADDRESSES["client"][1],
            gateway=LINKS["gateway"],
            service=LINKS["service"],
            router=_router(LINKS["gateway"]),
        )
        self.second_gateway, self.hop = LINKS["gateway-2"], LINKS["hop"]
        self._closing = ExitStack()
        self._hosts: dict[str, Namespace] = {}

    def build(self) -> None:
        """Create hosts and links. Raises RuntimeError with the output of a command that failed."""
        router = self._add("router")
        for host, address in LINKS.items():
            self._add(host)
            with router.entered():
                network = address.split(".")[1]
                link = f"to-{'a' if network == '80' else 'b'}-{host}"
                _ip(
                    f"link add {link} type veth peer name eth0 netns /proc/{os.getpid()}/fd/{self._hosts[host].fd}",
                    f"address add {_router(address)}/{MASK} dev {link}",
                    *_up(link),
                )
                _do("tc", "qdisc", "replace", "dev", link, "root", *SHAPE)
            with self._hosts[host].entered():
                addresses = (address, *MORE_ADDRESSES.get(host, ()))
                _ip(
                    "link set lo up",
                    *(f"address add {each}/{MASK} dev eth0" for each in addresses),
                    *_up("eth0"),
                    f"route add default via {_router(address)}",
                )
        with router.entered():
            _ip("link set lo up")
            with open("/proc/sys/net/ipv4/ip_forward", "w") as switch:
                switch.write("1")
            _do("nft", "-f", "-", given=_firewall())

    def on(self, part: str) -> AbstractContextManager[None]:
        """Enter a part's host while the block runs."""
        return self._hosts[HOST_OF_PART.get(part, part)].entered()

    def cut(self, host: str) -> None:
        """Take a host off the network without notice, as in a power failure."""
        with self._hosts[host].entered():
            _ip("link set eth0 down")

    def close(self) -> None:
        """Close all descriptors. The kernel removes a namespace with its last process."""
        self._closing.close()

    def _add(self, name: str) -> Namespace:
        host = self._hosts[name] = Namespace()
        self._closing.callback(host.close)
        return host


@contextmanager
def hosts() -> Iterator[Hosts]:
    """Create the hosts for the duration of the block."""
    ground = Hosts()
    try:
        ground.build()
        yield ground
    finally:
        ground.close()


def _firewall() -> str:
    """Return the lab's rules, extended to several links per network; hosts of one network may reach each other."""
    rules = FIREWALL.replace('"to-a"', '"to-a-*"').replace('"to-b"', '"to-b-*"')
    inside = "".join(f'        iifname "to-{n}-*" oifname "to-{n}-*" accept\n' for n in "ab")
    head, established, rest = rules.partition("        ct state established,related accept\n")
    assert established
    return head + established + inside + rest


def _up(link: str) -> tuple[str, str]:
    return f"link set {link} gso_max_segs 1 mtu 1500", f"link set {link} up"


def _router(address: str) -> str:
    return address.rpartition(".")[0] + ".1"


def _own() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _check(result: int, call: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def _ip(*lines: str) -> None:
    _do("ip", "-batch", "-", given="\n".join(lines) + "\n")


def _do(*command: str, given: str | None = None) -> None:
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}\n{given or ''}")
