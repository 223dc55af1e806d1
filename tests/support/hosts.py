"""Two networks of real hosts on this machine: network namespaces, one a host, with a router between them.

    network a                          the router                       network b
    10.80.1.2  client, discovery  ───  10.80.1.1    10.90.1.1  ───  10.90.1.2  gateway
    10.80.2.2  relay              ───  10.80.2.1    10.90.2.1  ───  10.90.2.2  services
    10.80.3.2  TURN server        ───  10.80.3.1    10.90.3.1  ───  10.90.3.2  second gateway
                                                    10.90.4.1  ───  10.90.4.2  hop
                                  masquerades b → a, drops a → b

Every link is a veth pair with an MTU of 1500 on which no larger segment ever travels (`gso_max_segs 1`), and the router
lets through no more than 100 Mb/s to each host. That is where TURN servers show what they lose: on loopback, or a veth as
it comes, one write arrives as one read, in no time. Nothing but the router drops: a sender whose own queue drops what it
sends is given up by Linux after fifteen drops in a row, 7.5 s, which two hundred greedy streams bring about.

The namespaces have no names. Each is held by a descriptor of this process and by the processes in it, so that the kernel
takes everything away with the last of them, however that one ends.
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
"""Bursts of two segments, so that what is sent in one piece arrives piece by piece; 50 ms of queue are what a router keeps."""

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
    """A network namespace. `entered()` moves this thread there and back."""

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
        """Be there while the block runs, which must not wait for the loop: others run in this thread, too."""
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
        """Let go of it."""
        os.close(self.fd)


class Hosts:
    """The ground of a mesh whose parts have hosts of their own."""

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
        """Make hosts and links. RuntimeError says what a command that failed has said."""
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
        """Be on a part's host while the block runs."""
        return self._hosts[HOST_OF_PART.get(part, part)].entered()

    def cut(self, host: str) -> None:
        """Take a host off the net, as when its power fails: nobody is told."""
        with self._hosts[host].entered():
            _ip("link set eth0 down")

    def close(self) -> None:
        """Let go of all; the kernel removes what no process is in any more."""
        self._closing.close()

    def _add(self, name: str) -> Namespace:
        host = self._hosts[name] = Namespace()
        self._closing.callback(host.close)
        return host


@contextmanager
def hosts() -> Iterator[Hosts]:
    """Have the hosts there while the block runs."""
    ground = Hosts()
    try:
        ground.build()
        yield ground
    finally:
        ground.close()


def _firewall() -> str:
    """The lab's own, over several links of each network, which may talk among themselves."""
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
