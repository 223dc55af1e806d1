"""The API document compared with a real server: routes, fields and answers."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

import msgspec
import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from jsonschema_rs import Draft202012Validator, ValidationError
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from discovery.api import DiscoveryServer, DiscoveryServerConfig
from discovery.api.timing import ServerTiming, WatchTiming
from discovery.api.watchers import mark_stale
from discovery.model.spec import SPEC_TYPES, Kind
from tests.discovery.conftest import DEADLINE_S

pytestmark = pytest.mark.anyio

DOCUMENT: dict[str, Any] = yaml.safe_load(resources.files("discovery.api").joinpath("openapi.yaml").read_text())
METHODS = {"get", "put", "post", "delete", "patch", "head", "options", "trace"}
OPERATIONS = [(method, path) for path, item in DOCUMENT["paths"].items() for method in item if method in METHODS]
ANSWERED = [each for each in OPERATIONS if each != ("get", "/v1/watch")]  # that answer never ends
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)

EXAMPLES = 8
"""Generated valid requests of each operation, and as many invalid ones. More take longer without finding more."""

CHECKED = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def takes_something(method: str, path: str) -> bool:
    """Whether there can be invalid requests for the operation."""
    item = DOCUMENT["paths"][path]
    return bool(item.get("parameters") or item[method].get("parameters") or item[method].get("requestBody"))


def test_routes_and_document_agree() -> None:
    server = DiscoveryServer(DiscoveryServerConfig(listen=(("127.0.0.1", 0),)))
    assert sorted((route.method.lower(), route.path) for route in server.routes()) == sorted(OPERATIONS)


@pytest.mark.parametrize("kind", Kind)
def test_every_field_of_a_spec_is_in_the_document(kind: Kind) -> None:
    struct = SPEC_TYPES[kind]
    schema = DOCUMENT["components"]["schemas"][struct.__name__]
    fields = msgspec.structs.fields(struct)
    assert set(schema.get("properties", ())) == {field.encode_name for field in fields}
    assert set(schema.get("required", ())) == {field.encode_name for field in fields if field.required}


@pytest.fixture
async def at(serve: Any, tokens: Any) -> AsyncIterator[Any]:
    async with serve(tokens_file=tokens.path, turn_secrets={"a": "secret"}, requests_per_s=0) as at:
        yield at


def ask_generated(
    operation: Any, mode: GenerationMode, url: str, token: str, checks: list[Any], examples: int = EXAMPLES
) -> None:
    """Send generated requests, and check each answer against the document."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(base_url=url, headers={"Authorization": f"Bearer {token}"}, checks=checks)

    try:
        ask()
    except FailureGroup as failure:  # not an Exception: it would end the task that runs the fixtures
        raise AssertionError(str(failure)) from None


@pytest.mark.parametrize(("method", "path"), ANSWERED)
async def test_answers_are_as_documented(at: Any, tokens: Any, method: str, path: str) -> None:
    operation = SCHEMA[path][method.upper()]
    await asyncio.to_thread(ask_generated, operation, GenerationMode.POSITIVE, at.url, tokens["operator"], CHECKED)


@pytest.mark.parametrize(("method", "path"), [each for each in ANSWERED if takes_something(*each)])
async def test_undocumented_requests_are_refused(at: Any, tokens: Any, method: str, path: str) -> None:
    operation = SCHEMA[path][method.upper()]
    # If a query parameter is given twice the first one is used, which this check would report as an error.
    checks = [*CHECKED, negative_data_rejection] if method != "get" else CHECKED
    await asyncio.to_thread(ask_generated, operation, GenerationMode.NEGATIVE, at.url, tokens["operator"], checks)


@pytest.mark.parametrize("kind", Kind)
async def test_the_documented_examples_work(at: Any, tokens: Any, kind: Kind) -> None:
    token = tokens["operator"]
    path = f"/v1/records/{kind}/b/{'b' if kind is Kind.NETWORK else 'one'}"
    for spec in DOCUMENT["components"]["schemas"][SPEC_TYPES[kind].__name__]["examples"]:
        answer = await at.ask("PUT", path, {"spec": spec}, token=token)
        assert answer.status == 201
        valid("Record", answer.body)
        assert {key: value for key, value in spec.items() if value != answer.body["spec"].get(key)} == {}
        valid("Record", (await at.ask("GET", path, token=token)).body)
        for reader in ("operator", "b", "c"):
            valid("RecordList", (await at.ask("GET", "/v1/records", token=tokens[reader])).body)


async def test_a_watch_is_as_documented(serve: Any, tokens: Any) -> None:
    async with serve(tokens_file=tokens.path, timing=ServerTiming(watch=WatchTiming(heartbeat_s=0.02))) as at:
        lease = (await at.ask("POST", "/v1/leases", {"ttl_s": 60}, token=tokens["b"])).body["id"]
        for number in range(2):
            body = {"spec": {"addresses": ["10.0.0.9"], "ports": [443]}, "lease": lease}
            assert (await at.ask("PUT", f"/v1/records/relay/b/r{number}", body, token=tokens["b"])).status == 201
        headers = {"Authorization": f"Bearer {tokens['c']}"}
        async with at.session.get(f"{at.url}/v1/watch", headers=headers) as response, asyncio.timeout(DEADLINE_S):
            assert response.content_type in DOCUMENT["paths"]["/v1/watch"]["get"]["responses"]["200"]["content"]
            assert response.headers["Crossnet-Epoch"] == at.store.epoch
            lines = [json.loads(await response.content.readline()) for _ in range(4)]
            assert await response.content.readline() == b"\n"
            assert (await at.ask("DELETE", f"/v1/leases/{lease}", token=tokens["b"])).status == 200
            while len(lines) < 6:
                line = await response.content.readline()
                lines += [json.loads(line)] if line.strip() else []
        assert [line["type"] for line in lines] == ["reset", "put", "put", "sync", "delete", "delete"]
        for line in (*lines, json.loads(mark_stale(3, 1.5))):
            valid("WatchLine", line)
        for wrong in ({"type": "put", "revision": 1}, {"type": "sync", "revision": 1}, {"type": "reset", "epoch": "x"}):
            with pytest.raises(ValidationError):
                valid("WatchLine", wrong)


async def test_an_undocumented_method_is_refused_and_the_documented_ones_are_listed(at: Any) -> None:
    for path, item in DOCUMENT["paths"].items():
        documented = {method.upper() for method in item if method in METHODS}
        for method in {"GET", "PUT", "POST", "DELETE", "PATCH", "OPTIONS"} - documented:
            answer = await at.ask(method, re.sub("{.*?}", "x", path))
            assert (answer.status, answer.body["error"]) == (405, "method_not_allowed")
            assert set(answer.headers["Allow"].split(", ")) == documented


def valid(name: str, value: object) -> None:
    """Check a value against a schema of the document. Raises ValidationError."""
    Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}).validate(value)
