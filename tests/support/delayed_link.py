"""Two hosts with a link of a given delay between them, so that TCP sees the round trip: TUN devices, and packets passed on later.

It is also the program that passes them on: delayed_link.py FD FD SECONDS. The kernel's netem would do the same, but the kernels of
many small machines do not have it. Nothing is lost, and the order is kept.
"""

import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x1, 0x1000
MTU = 16_000
"""Large packets, since each costs this program some microseconds."""
QUEUE_PACKETS = 10_000


def _pass_on(one: int, other: int, late_s: float) -> None:
    to = {one: other, other: one}
    held: deque[tuple[float, int, bytes]] = deque()
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        ready, _, _ = select.select(list(to), [], [], wait)
        for device in ready:
            for _ in range(64):
                try:
                    packet = os.read(device, 65536)
                except BlockingIOError:
                    break
                held.append((time.monotonic() + late_s, to[device], packet))
        while held and held[0][0] <= time.monotonic():
            _, device, packet = held.popleft()
            os.write(device, packet)


@contextmanager
def delayed_hosts(late_s: float) -> Iterator[tuple["Namespace", "Namespace"]]:
    """Have two hosts, HERE and THERE of `two_hosts`, with a link that delays packets by `late_s` each way, while the block runs."""
    here, there = Namespace(), Namespace()
    devices: list[int] = []
    passing: subprocess.Popen[bytes] | None = None
    try:
        for host, address in ((here, HERE), (there, THERE)):
            with host.entered():
                device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
                devices.append(device)
                fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"far0", IFF_TUN | IFF_NO_PI))
                for command in (
                    f"ip link set far0 mtu {MTU} txqueuelen {QUEUE_PACKETS} up",
                    f"ip address add {address}/24 dev far0",
                    "ip link set lo up",
                ):
                    subprocess.run(command.split(), check=True, capture_output=True, timeout=10)
        arguments = [sys.executable, __file__, *map(str, devices), str(late_s)]
        passing = subprocess.Popen(arguments, pass_fds=devices)
        yield here, there
    finally:
        if passing is not None:
            passing.kill()
            passing.wait()
        for device in devices:
            os.close(device)
        here.close()
        there.close()


if __name__ == "__main__":
    _pass_on(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
else:
    from tests.support.hosts import Namespace
    from tests.support.two_hosts import HERE, THERE
