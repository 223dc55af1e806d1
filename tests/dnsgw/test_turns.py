"""Work that takes turns."""

import asyncio

import pytest

from dnsgw.turns import Turns

pytestmark = pytest.mark.anyio


class Job:
    """So many portions of work."""

    def __init__(self, name: str, portions: int, log: list[str]) -> None:
        self.name, self.left, self.log = name, portions, log

    def __call__(self) -> bool:
        self.log.append(self.name)
        self.left -= 1
        return self.left > 0


async def all_done(*jobs: Job) -> None:
    async with asyncio.timeout(5):
        while any(job.left for job in jobs):
            await asyncio.sleep(0)


async def test_portions_take_turns() -> None:
    turns, log = Turns(asyncio.get_running_loop()), list[str]()
    jobs = [Job(name, 3, log) for name in "abc"]
    for job in jobs:
        turns.add(job)
    await all_done(*jobs)
    assert "".join(log) == "abc" * 3


async def test_who_just_woke_goes_first_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnsgw.turns.PASS_S", 0.0)  # one portion between two looks at the sockets
    turns, log = Turns(asyncio.get_running_loop()), list[str]()
    busy = Job("b", 10, log)
    turns.add(busy)
    await asyncio.sleep(0)
    for _ in range(9):
        turns.add(Job("n", 1, log))
    await all_done(busy)
    assert log[1:3] != ["b", "b"]
    assert "b" in log[1:7]
    assert log.count("n") == 9


async def test_the_loop_sees_to_others_between_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnsgw.turns.PASS_S", 0.0)
    turns, log = Turns(asyncio.get_running_loop()), list[str]()
    endless = Job("e", 1 << 30, log)
    turns.add(endless)
    for count in range(1, 20):
        await asyncio.sleep(0)
        assert len(log) <= count + 1
    endless.left = 1
    await all_done(endless)


async def test_a_fault_costs_the_others_nothing(caplog: pytest.LogCaptureFixture) -> None:
    turns, log = Turns(asyncio.get_running_loop()), list[str]()
    turns.add(lambda: bool(1 // 0))
    job = Job("j", 2, log)
    turns.add(job)
    await all_done(job)
    assert log == ["j", "j"]
    assert "dns_turn_failed" in caplog.text
