"""Streams for sleeping services: they are held while the service is woken once, and refused in time if it does not wake."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from discovery.model.mesh import AnyRecord, Kind, ServiceSpec
from discovery.pacing.backoff import Backoff
from sniproxy.access.name_pattern import NamePattern
from sniproxy.access.rules import Policy, Rule
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.capsules import Payload
from tests.support.fixed_discovery import record
from tests.support.gateways import Running, Visit, a_gateway
from tests.support.hellos import client_hello
from tests.support.preambles import KEY, name_for, preamble
from tests.support.waiting import eventually
from turnreg.gateway.activation import ActivationRule
from turnreg.gateway.activation_trigger import Command, HttpCall, Trigger
from turnreg.gateway.limits import GatewayLimits

pytestmark = pytest.mark.anyio

NAME = "orders.shop.example"
HELLO = client_hello(NAME)


def asleep(*endpoints: str, name: str = NAME) -> AnyRecord:
    """Make the record of a service that is not running."""
    return record(Kind.SERVICE, "b", name, ServiceSpec(name=name, ports={"8443": list(endpoints)}))


def rule(trigger: Trigger, *names: str, timeout_s: float = 8.0, **changes: object) -> ActivationRule:
    patterns = tuple(map(NamePattern.parse, names or ("*.shop.example",)))
    return ActivationRule(names=patterns, trigger=trigger, timeout_s=timeout_s, **changes)  # type: ignore[arg-type]


def counted(folder: Path, *then: str) -> Command:
    """Make a command that writes a line each time it runs, and then continues with this shell script."""
    return Command(("sh", "-c", "\n".join([f"echo $CROSSNET_SERVICE >>{folder}/runs", *then])))


def runs(folder: Path) -> list[str]:
    path = folder / "runs"
    return path.read_text().split() if path.exists() else []


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def sample(running: Running, name: str, **labels: str) -> float | None:
    return running.registry.get_sample_value(f"crossnet_gateway_{name}", labels)


async def visit(running: Running, target: str = f"{NAME}:8443", **changes: object) -> Visit:
    name = name_for(target)
    hello = client_hello(name)
    return await running.visit(preamble(target, hello, authority=name, **changes), hello)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Path]:
    """A file for the process ids of servers that commands start. They are ended after the test, or end within a minute."""
    yield tmp_path / "pids"
    for pid in (tmp_path / "pids").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGTERM)


# --- services that wake ---------------------------------------------------------------------------------------------


@pytest.mark.needs("socat")
async def test_a_command_starts_a_server_once_for_all_streams(tmp_path: Path, servers: Path) -> None:
    """The endpoint is known, and refuses connections until the command has run."""
    port = free_port()
    start = f"timeout 60 socat TCP-LISTEN:{port},fork,reuseaddr,bind=127.0.0.1 EXEC:cat >/dev/null 2>&1 & echo $! >>{servers}"
    async with a_gateway(
        asleep(f"127.0.0.1:{port}"), activate=(rule(counted(tmp_path, "sleep 0.3", start), NAME),)
    ) as running:
        visits = [await visit(running) for _ in range(20)]
        for each in visits:
            await each.opened()
        got = b""
        while len(got) < len(HELLO):  # it may have come along with OPENED
            got += b"".join(
                bytes(event.data) for event in await visits[0].connection.read() if isinstance(event, Payload)
            )
        assert got == HELLO, "the real server gives it back"
        assert runs(tmp_path) == [NAME]
        assert sample(running, "activations_total", result="ok") == 1
        assert sample(running, "held_streams_total", result="delivered") == 20
        assert sample(running, "held_streams_live") == 0
        again = await visit(running)
        await again.opened()
        assert runs(tmp_path) == [NAME], "an awake service is dialled at once"
        for each in (*visits, again):
            each.stream.close()
        await running.ended(21)


async def test_a_call_has_an_endpoint_published(tmp_path: Path) -> None:
    """The service has no endpoint at all; the HTTP call has one started and published in discovery."""
    asked: list[str] = []
    all_held = asyncio.Event()
    async with a_gateway(asleep()) as running:

        async def scale(request: web.Request) -> web.Response:
            asked.append(request.headers["Crossnet-Service"])
            await all_held.wait()
            service = await running.service(known=False)
            running.discovery.put(asleep(service.endpoint))
            return web.Response(status=202)

        app = web.Application()
        app.router.add_post("/scale", scale)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            call = HttpCall(url=f"http://127.0.0.1:{runner.addresses[0][1]}/scale")
            # A reload brings the rule: what sleeps from now on is woken.
            running.gateway.reconfigure(replace(running.gateway.config, activate=(rule(call),)), {KEY.id: KEY})
            visits = [await visit(running) for _ in range(5)]
            for each in visits:
                await each.held()
            all_held.set()
            for each in visits:
                await each.opened()
                each.stream.close()
        finally:
            await runner.cleanup()
        assert asked == [NAME]
        await running.ended(5)


async def test_the_first_rule_that_names_a_service_counts(tmp_path: Path) -> None:
    other = "pay.shop.example"
    rules = (rule(counted(tmp_path, "exit 1"), NAME), rule(Command(("false",)), "**.example"))
    async with a_gateway(asleep(), asleep(name=other), activate=rules) as running:
        for name in (NAME, other, NAME):
            refused = await (await visit(running, f"{name}:8443")).refused(after_ready=True)
            assert refused.detail.endswith("waking it failed")
    assert runs(tmp_path) == [NAME]


async def test_a_stream_that_gives_up_leaves_its_turn_to_the_next(tmp_path: Path) -> None:
    """The first stream polls for all; when it times out, another one continues."""
    async with a_gateway(asleep(), activate=(rule(counted(tmp_path), timeout_s=0.4),)) as running:
        first = await visit(running)
        await first.held()
        config = running.gateway.config
        running.gateway.reconfigure(replace(config, activate=(rule(counted(tmp_path)),)), {KEY.id: KEY})
        others = [await visit(running) for _ in range(3)]
        for each in others:
            await each.held()
        assert (await first.refused(after_ready=True)).reason == Reason.NO_ENDPOINT
        assert sample(running, "held_streams_live") == 3
        service = await running.service(known=False)
        running.discovery.put(asleep(service.endpoint))
        for each in others:
            await each.opened()
            each.stream.close()
        assert runs(tmp_path) == [NAME]
        await running.ended(4)


# --- services that do not -------------------------------------------------------------------------------------------


async def test_a_command_that_fails_is_not_run_for_each_stream(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "turnreg.gateway.activation")
    async with a_gateway(
        asleep(), activate=(rule(counted(tmp_path, "sleep 0.2", "echo no quota", "exit 7")),)
    ) as running:
        visits = [await visit(running) for _ in range(10)]
        visits += [await visit(running) for _ in range(10)]
        for each in visits:
            refused = await each.refused(after_ready=True)
            assert refused.reason == Reason.NO_ENDPOINT
            assert refused.detail == f"service {NAME!r} has no endpoint for port 8443; waking it failed"
        later = await (await visit(running)).refused(after_ready=True)
        assert later.detail == refused.detail, "the output of the command is not sent to another network"
        assert sample(running, "activations_total", result="failed") == 1
        assert sample(running, "held_streams_total", result="refused") == 21
        assert {line["reason"] for line in await running.ended(21)} == {"no_endpoint"}
    assert runs(tmp_path) == [NAME]
    (event,) = [line.event for line in caplog.records if line.message == "activation"]  # type: ignore[attr-defined]
    assert (event["service"], event["by"], event["result"]) == (NAME, "command", "failed")
    assert event["detail"] == "exit code 7: no quota"
    assert event["retry_s"] > 0


async def test_the_pause_grows_with_failures_in_a_row(tmp_path: Path) -> None:
    limits = GatewayLimits(trigger_backoff=Backoff(0.05, 60.0))
    async with a_gateway(asleep(), activate=(rule(counted(tmp_path, "exit 1")),), limits=limits) as running:
        async with asyncio.timeout(20):
            while len(runs(tmp_path)) < 4:
                await (await visit(running)).refused(after_ready=True)
        wake = running.gateway._activation._wake_states[NAME]
        assert wake.failures >= 3
        count = len(await running.ended())
    assert count > len(runs(tmp_path)), "the streams in between ran nothing"


async def test_a_service_that_does_not_wake_in_time(tmp_path: Path) -> None:
    """The command succeeded, but nothing answers: it does not run again before its cooldown is over."""
    async with a_gateway(asleep(), activate=(rule(counted(tmp_path), timeout_s=0.3),)) as running:
        for _ in range(2):
            refused = await (await visit(running)).refused(after_ready=True)
            assert refused.reason == Reason.NO_ENDPOINT
            assert "nothing answered within 0.3 s" in refused.detail
    assert runs(tmp_path) == [NAME]


async def test_after_its_cooldown_it_is_woken_again(tmp_path: Path) -> None:
    async with a_gateway(asleep(), activate=(rule(counted(tmp_path), timeout_s=0.2, cooldown_s=0.01),)) as running:
        for _ in range(2):
            await (await visit(running)).refused(after_ready=True)
    assert runs(tmp_path) == [NAME, NAME]


async def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    async with a_gateway(asleep(), activate=(rule(counted(tmp_path, "sleep 1000"), run_timeout_s=0.3),)) as running:
        refused = await (await visit(running)).refused(after_ready=True)
        assert "waking it failed" in refused.detail
        assert sample(running, "activations_total", result="timeout") == 1


# --- bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["of the service", "of all"])
async def test_the_number_of_held_streams_is_limited(tmp_path: Path, bound: str) -> None:
    one = rule(counted(tmp_path), max_held=2 if bound == "of the service" else 100)
    most = 2 if bound == "of all" else 100
    async with a_gateway(asleep(), activate=(one,), max_held=most) as running:
        visits = [await visit(running) for _ in range(2)]
        for each in visits:
            await each.held()
        refused = await (await visit(running)).refused(after_ready=True)
        assert refused.reason == Reason.OVERLOADED
        assert sample(running, "held_streams_total", result="overloaded") == 1
        service = await running.service(known=False)
        running.discovery.put(asleep(service.endpoint))
        for each in visits:
            await each.opened()
            each.stream.close()
        await running.ended(3)


async def test_the_number_of_triggers_at_once_is_limited(tmp_path: Path) -> None:
    names = [f"s{number}.shop.example" for number in range(6)]
    wake = Command(("sh", "-c", f"echo begin >>{tmp_path}/runs; sleep 0.1; echo end >>{tmp_path}/runs"))
    sleeping = [asleep(name=name) for name in names]
    limits = GatewayLimits(max_triggers=2)
    async with a_gateway(*sleeping, activate=(rule(wake, timeout_s=2.0),), limits=limits) as running:
        visits = [await visit(running, f"{name}:8443") for name in names]
        await eventually(lambda: runs(tmp_path).count("end") == len(names), 20)
        for each in visits:
            each.stream.close()
    at_once = most = 0
    for line in runs(tmp_path):
        at_once += 1 if line == "begin" else -1
        most = max(most, at_once)
    assert most == 2


@pytest.mark.parametrize("why", ["no rule", "address", "unknown service", "unknown port", "denied", "not allowed"])
async def test_nothing_is_woken(tmp_path: Path, why: str) -> None:
    """A service without a rule, a target that is not a service, or a stream that is denied anyway."""
    name = "orders.other.example" if why == "no rule" else NAME
    target = {
        "address": f"127.0.0.1:{free_port()}",
        "unknown service": "unknown.shop.example:8443",
        "unknown port": f"{NAME}:9443",
    }.get(why, f"{name}:8443")
    policy = Policy((Rule.parse(action="deny", sources=["a"]),)) if why == "denied" else Policy()
    endpoints = ["192.0.2.1:8443"] if why == "not allowed" else []
    changes = {"activate": (rule(counted(tmp_path)),), "policy": policy}
    async with a_gateway(asleep(*endpoints, name=name), **changes) as running:  # type: ignore[arg-type]
        refused = await (await visit(running, target)).refused(after_ready=True)
        assert refused.reason in {Reason.NO_ENDPOINT, Reason.DIAL_FAILED, Reason.UNKNOWN_NAME, Reason.DENIED}
    assert runs(tmp_path) == []


async def test_rules_by_target_are_asked_when_there_is_one(tmp_path: Path) -> None:
    """The stream waits while no address is known; the address that is published then is not allowed."""
    policy = Policy((Rule.parse(action="allow", to=["192.0.2.0/24"]),))
    async with a_gateway(asleep(), activate=(rule(counted(tmp_path)),), policy=policy) as running:
        waiting = await visit(running)
        await waiting.held()
        service = await running.service(known=False)
        running.discovery.put(asleep(service.endpoint))
        assert (await waiting.refused(after_ready=True)).reason == Reason.DENIED
        assert not service.streams


# --- the gateway's end ----------------------------------------------------------------------------------------------


async def test_a_gateway_that_drains_delivers_what_it_holds(tmp_path: Path) -> None:
    async with a_gateway(asleep(), activate=(rule(counted(tmp_path)),)) as running:
        waiting = await visit(running)
        await waiting.held()
        assert [row["state"] for row in running.gateway.ledger.rows()] == ["held"]
        service = await running.service(known=False)
        running.gateway.close()
        running.discovery.put(asleep(service.endpoint))
        await waiting.opened()
        waiting.stream.close()
        await running.ended(1)


async def test_a_gateway_that_ends_ends_its_commands(tmp_path: Path) -> None:
    async with a_gateway(
        asleep(), activate=(rule(counted(tmp_path, f"echo $$ >{tmp_path}/pid", "sleep 1000")),)
    ) as running:
        waiting = await visit(running)
        await eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    waiting.stream.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


async def test_services_that_are_awake_for_long_are_forgotten(tmp_path: Path) -> None:
    names = [f"s{number}.shop.example" for number in range(20)]
    records = [asleep(name=name) for name in names]
    async with a_gateway(*records, activate=(rule(counted(tmp_path), timeout_s=0.05, cooldown_s=0.001),)) as running:
        for name in names:
            await (await visit(running, f"{name}:8443")).refused(after_ready=True)
        assert len(running.gateway._activation._wake_states) < 5
