"""Every part as a real process, and each of them killed in turn: what keeps working, and what recovers by itself."""

from collections.abc import Callable, Iterator

import pytest
import yaml

from crossnet.lab.clients import Attempt, Clients
from crossnet.lab.stage import Stage
from crossnet.lab.topology import Loopback
from tests.support.waiting import wait_until

BACK_WITHIN_S = 10.0  # allowed to a gateway after its TURN server is back


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    topology = Loopback()
    topology.build()
    made = Stage(topology, tmp_path_factory.mktemp("stage"), turn="embedded", wanted_service="python")
    try:
        made.stand()
        yield made
    finally:
        made.clear()


def ask(stage: Stage) -> Attempt:
    clients = Clients(stage.topology, stage.authority.path, stage.client, stage.folder)
    return clients.ask("python", stage.compact_name, stage.plan.relay)


def served(stage: Stage) -> bool:
    attempt = ask(stage)
    return attempt.status == 0 and attempt.seen is not None and attempt.seen.serial == stage.client.serial


def within(limit_s: float, ready: Callable[[], bool]) -> bool:
    try:
        wait_until(ready, limit_s)
    except TimeoutError:
        return False
    return True


def test_streams_go_on_without_discovery_and_it_comes_back(stage: Stage) -> None:
    stage.programs["discovery"].kill()
    assert served(stage)
    stage.start_part("discovery")
    assert within(BACK_WITHIN_S, lambda: (stage.ask("relay", "/status") or {})["discovery"]["connected"])
    assert served(stage)


def test_a_gateway_registers_anew_when_its_turn_server_is_back(stage: Stage) -> None:
    before = stage.registration()["relayed"]
    stage.programs["turn"].kill()
    assert not served(stage)
    stage.start_part("turn")
    assert within(BACK_WITHIN_S, lambda: bool(stage.registration().get("permissions"))), stage.registration()
    assert within(BACK_WITHIN_S, lambda: served(stage))
    assert stage.registration()["relayed"] != before


def test_a_second_gateway_takes_over_at_once(stage: Stage) -> None:
    document = yaml.safe_load(stage.parts.path("gateway").read_text())
    document["gateway"]["id"] = "gw-2"
    document["admin"] = f"{stage.plan.gateway}:8699"
    stage.parts.path("gateway-2").write_text(yaml.safe_dump(document))
    stage.plan.admin_ports["gateway-2"] = 8699
    stage.start_part("gateway-2")

    def allocations() -> list[str]:
        records = (stage.ask("relay", "/mesh") or {})["records"]
        return [record["id"] for record in records if record["kind"] == "allocation"]

    assert within(BACK_WITHIN_S, lambda: len(allocations()) == 2)
    assert within(BACK_WITHIN_S, lambda: served(stage))
    stage.programs["gateway"].kill()
    assert all(served(stage) for _ in range(4))

    # On SIGTERM it withdraws its records, long before its lease would have expired.
    stage.programs["gateway-2"].ask_to_end()
    stage.programs["gateway-2"].end()
    assert within(2.0, lambda: "gw-2.a.turn-1" not in allocations())
