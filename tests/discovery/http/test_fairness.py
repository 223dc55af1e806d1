"""Fair scheduling of requests."""

import asyncio
import resource

import pytest

from discovery.http.fairness import Gate
from discovery.http.listener import ListenerLimits

LIMIT_S = 10.0


def test_descriptors_are_kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ListenerLimits(connections=8192, connections_per_address=2048, request_bytes=1, files_share=4)
    for files, expected in ((1024, (256, 128)), (1 << 20, (8192, 2048)), (3, (1, 1))):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert made.effective() == expected


@pytest.mark.anyio
async def test_heavy_clients_take_turns_and_light_ones_do_not_wait() -> None:
    gate, order = Gate(), []

    async def ask(who: str, *, crowd: bool) -> None:
        await gate.enter(who, crowd=crowd)
        order.append(who)

    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(ask("many", crowd=True))
        for _ in range(3):
            group.create_task(ask("few", crowd=True))
        group.create_task(ask("quiet", crowd=False))
    assert order.index("quiet") <= 1
    assert [each for each in order if each != "quiet"][:6].count("few") >= 2


@pytest.mark.anyio
async def test_a_cancelled_request_does_not_block_the_queue() -> None:
    gate = Gate()
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
        tasks = [group.create_task(gate.enter(number % 3, crowd=True)) for number in range(30)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
    await gate.enter("next", crowd=True)
