"""Tests mirror the packages: every module has its test file and every test file its module, except for those listed here."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("crossnet", "discovery", "dnsgw", "sniproxy", "turnreg")

TESTED_BY = {
    "crossnet/app/discovery_client": "crossnet/app/test_app",
    "crossnet/app/drain": "e2e/test_processes_drain",
    "crossnet/app/readiness": "crossnet/app/test_inspection",
    "crossnet/app/roles": "crossnet/config/test_reload_fields",
    "crossnet/config/reference": "crossnet/config/test_settings",
    "crossnet/config/sections": "crossnet/config/test_sections",
    "crossnet/lab": "crossnet/lab/test_run",
    "discovery/api": "discovery/test_api",
    "discovery/client/config": "discovery/client/test_client",
    "discovery/client/follower": "discovery/client/test_client",
    "discovery/client/refusals": "discovery/client/test_client",
    "discovery/client/writer": "discovery/client/test_client",
    "discovery/files/tls_files": "discovery/client/test_servers",
    "discovery/publisher/config": "discovery/publisher/test_role",
    "discovery/publisher/endpoints": "discovery/publisher/test_table",
    "discovery/publisher/kubernetes": "discovery/publisher/test_role",
    "discovery/publisher/objects": "discovery/publisher/test_table",
    "discovery/store/etcdapi": "discovery/store/test_etcd",
    "discovery/store/memory": "discovery/store/test_base",
    "dnsgw/mesh_zone/current": "dnsgw/test_resolver",
    "dnsgw/mesh_zone/dual_stack": "dnsgw/test_resolver",
    "dnsgw/pending_query": "dnsgw/test_resolver",
    "dnsgw/upstream/capabilities": "dnsgw/upstream/test_forwarder",
    "dnsgw/upstream/limits": "dnsgw/upstream/test_server",
    "dnsgw/upstream/outstanding": "dnsgw/upstream/test_forwarder",
    "sniproxy/engine/byte_stream": "sniproxy/engine/test_socket_stream",
    "sniproxy/relay/accept": "e2e/test_arrival",
    "sniproxy/relay/permission": "sniproxy/relay/test_relay_rules",
    "sniproxy/relay/upstream_metrics": "sniproxy/relay/test_upstreams",
    "sniproxy/streams/end_reason": "sniproxy/streams/test_stream_log",
    "sniproxy/transport": "sniproxy/relay/test_router",
    "sniproxy/tunnel/keys": "sniproxy/relay/test_router",
    "turnreg/client/timing": "turnreg/client/test_allocation",
    "turnreg/gateway/config": "turnreg/gateway/test_gateway",
    "turnreg/gateway/handshake": "turnreg/gateway/test_gateway_forged",
    "turnreg/gateway/limits": "turnreg/gateway/test_gateway_limits",
    "turnreg/registrar/config": "turnreg/registrar/test_registrar",
    "turnreg/server": "turnreg/server/test_behaviour",
}
"""Modules or whole packages that are tested by the tests of another module."""

OVER_SEVERAL = {
    "crossnet/config/test_settings",
    "crossnet/test_dns_upstreams",
    "crossnet/test_publisher_role",
    "crossnet/test_readme",
    "crossnet/test_streams",
    "crossnet/test_turn_role",
    "discovery/publisher/test_recording",
    "discovery/test_api",
    "discovery/test_api_document",
    "discovery/test_cluster",
    "discovery/api/test_openapi",
    "dnsgw/test_clients",
    "dnsgw/test_forging",
    "dnsgw/test_hostile",
    "dnsgw/test_programs",
    "dnsgw/test_reconfigure",
    "sniproxy/tunnel/test_protocol_vectors",
    "sniproxy/tunnel/test_stranger",
    "turnreg/server/test_behaviour",
    "turnreg/server/test_datagram_decisions",
    "turnreg/test_sharing",
}
"""Test files of a package that cover several of its modules."""


def modules() -> set[str]:
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {
        str(path.relative_to(ROOT).with_suffix("")) for path in paths if path.name not in {"__init__.py", "__main__.py"}
    }


def files_of_tests() -> set[str]:
    paths = (path for package in PACKAGES for path in (ROOT / "tests" / package).rglob("test_*.py"))
    return {str(path.relative_to(ROOT / "tests").with_suffix("")) for path in paths}


def of(module: str, files: set[str]) -> list[str]:
    """Return the test files of a module: `test_NAME`, and `test_NAME_*`."""
    folder, _, name = module.rpartition("/")
    own = f"{folder}/test_{name}"
    return [file for file in files if file == own or file.startswith(f"{own}_")]


def packages_of(module: str) -> list[str]:
    parts = module.split("/")
    return ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_has_its_tests(module: str) -> None:
    if of(module, files_of_tests()):
        return
    named = next((TESTED_BY[place] for place in packages_of(module) if place in TESTED_BY), None)
    assert named is not None, f"tests/{module.rpartition('/')[0]}/test_{module.rpartition('/')[2]}.py"
    assert (ROOT / "tests" / f"{named}.py").is_file()


@pytest.mark.parametrize("file", sorted(files_of_tests()))
def test_a_test_file_has_its_module(file: str) -> None:
    assert file in OVER_SEVERAL or any(of(module, {file}) for module in modules()) or file in of_packages()


def of_packages() -> set[str]:
    """Return the test files that are named after an entry of TESTED_BY, such as a package."""
    return {file for place in TESTED_BY for file in of(place, files_of_tests())}


def test_the_lists_have_no_stale_entries() -> None:
    there = modules() | {package for module in modules() for package in packages_of(module)}
    assert set(TESTED_BY) <= there
    assert files_of_tests() >= OVER_SEVERAL
