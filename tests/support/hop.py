"""A program: a hop between a gateway and a TURN server that delays every connection, as a distant server would.

usage: hop.py ADDRESS PORT TO-ADDRESS TO-PORT SECONDS

A delayed data connection binds later, and the TURN server has to buffer what its peer has sent until then. The kernel's netem
could do the same, but many kernels of small machines lack it.
"""

import asyncio
import sys

import uvloop

from sniproxy.engine import Listener, SocketStream, Splice, connect

FOREVER_S = 3600.0
CONNECT_TIMEOUT_S = 10.0


async def _serve(address: str, port: int, to: tuple[str, int], late_s: float) -> None:
    async def pass_on(near: SocketStream) -> None:
        await asyncio.sleep(late_s)
        try:
            far = await connect(*to, timeout_s=CONNECT_TIMEOUT_S)
        except OSError:
            near.reset()
            return
        await Splice(near, far, idle_timeout_s=FOREVER_S, half_close_timeout_s=FOREVER_S).run()

    listener = await Listener.open(address, port)
    await listener.serve(pass_on)


if __name__ == "__main__":
    at_address, at_port, to_address, to_port, late = sys.argv[1:]
    uvloop.run(_serve(at_address, int(at_port), (to_address, int(to_port)), float(late)))
