"""Several gateways of one network on the same TURN server, which know of each other only through discovery."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from discovery.model.addresses import TargetList
from discovery.model.mesh import AllocationSpec, AnyRecord, Kind, Mesh, Record, Spec
from sniproxy.transport.base import Accepted
from tests.support.registered import QUICK, HandDiscovery, rank, relay, turn
from tests.support.turn_servers import LOGIN, turn_server
from tests.support.waiting import eventually
from turnreg.registrar.registrar import Registrar, RegistrarConfig

pytestmark = pytest.mark.anyio


class Board:
    """One discovery for several processes: all see a change a moment later."""

    def __init__(self, *records: AnyRecord) -> None:
        self.records = {record.key: record for record in records}
        self.views: list[View] = []
        self.least = 0
        """The smallest number of allocations at any time since this was set."""

    @property
    def held(self) -> list[str]:
        """The gateways that hold allocations, by their records."""
        return sorted(record.spec.gateway for key, record in self.records.items() if key[0] is Kind.ALLOCATION)

    def tell(self) -> None:
        self.least = min(self.least, len(self.held))
        mesh = Mesh.of(self.records.values())
        for view in self.views:
            asyncio.get_running_loop().call_later(0.01, view.see, mesh)


class View(HandDiscovery):
    def __init__(self, board: Board) -> None:
        super().__init__(*board.records.values())
        self._board = board
        board.views.append(self)

    def see(self, mesh: Mesh) -> None:
        self.set(*(record for record in mesh_records(mesh)))

    def publish(self, kind: Kind, id: str, spec: Spec, **options: Any) -> None:  # noqa: A002
        assert isinstance(spec, AllocationSpec)
        super().publish(kind, id, spec)
        self._board.records[kind, "b", id] = Record(kind=kind, network="b", id=id, revision=1, spec=spec)
        self._board.tell()

    def withdraw(self, kind: Kind, id: str, *, network: str | None = None) -> None:  # noqa: A002
        super().withdraw(kind, id, network=network)
        del self._board.records[kind, "b", id]
        self._board.tell()


def mesh_records(mesh: Mesh) -> list[AnyRecord]:
    return [*mesh.turns("a"), *mesh.relays("a"), *mesh.allocations("b")]


async def test_gateways_come_and_go_and_the_server_has_as_many_allocations_as_wanted() -> None:
    with turn_server("embedded") as server:
        board = Board(turn(server), relay({"turn-1": ["127.0.0.1"]}))
        streams: asyncio.Queue[Accepted] = asyncio.Queue()

        async with asyncio.TaskGroup() as group, AsyncExitStack() as closing:
            gateways: dict[str, Registrar] = {}

            def begin(gateway: str) -> None:
                config = RegistrarConfig(
                    network="b",
                    gateway=gateway,
                    turn={"a": LOGIN},
                    allow={"a": TargetList.parse(["127.0.0.0/8"])},
                    overlap_s=0.0,
                    retry=QUICK,
                )
                ours = gateways[gateway] = Registrar(config, View(board), CollectorRegistry())
                group.create_task(ours.run(streams.put_nowait))
                closing.push_async_callback(ours.close)

            begin("gw-1")
            await eventually(lambda: board.held == ["gw-1", "gw-1"])
            board.least = 2
            begin("gw-2")
            await eventually(lambda: board.held == ["gw-1", "gw-2"])
            for gateway in ("gw-3", "gw-4", "gw-5"):
                begin(gateway)
            # Where it stays: the two that rank first hold an allocation each, and the others have given theirs back.
            holders = sorted(sorted(gateways, key=rank)[:2])
            standing_by = sorted(gateways.keys() - set(holders))

            def states() -> list[str]:
                return [gateways[gateway].status()[0]["state"] for gateway in standing_by]

            await eventually(lambda: board.held == holders and states() == ["standby"] * 3)
            assert board.least == 2, "never fewer meanwhile"
            await gateways[holders[0]].close()
            await eventually(lambda: len(set(board.held) - {holders[0]}) == 2 == len(board.held))
            for gateway in standing_by:
                await gateways[gateway].close()
            await eventually(lambda: board.held == [holders[1]] * 2)
