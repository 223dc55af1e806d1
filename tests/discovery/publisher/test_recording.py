"""The publisher and the test server against a recording of a real kube-apiserver (`record.py`), and kubectl.

This proves nothing about API servers newer than the recorded one, which had EndpointSlices as v1beta1.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import trustme
import yaml
from aiohttp import web

from crossnet.config.file import load
from discovery.model.mesh import Kind
from tests.discovery.publisher.record import RECORDING
from tests.discovery.publisher.test_role import publishing, put_service, put_slice, until
from tests.discovery.waiting import LogWaiter, stored
from tests.support.kube_server import KubeServer, kube_server

pytestmark = pytest.mark.anyio

LIMIT_S = 20.0
MANIFEST = Path(__file__).parents[3] / "deploy/kubernetes/publisher.yaml"


@pytest.fixture(scope="module")
def recording() -> Any:
    return json.loads(RECORDING.read_text())


@asynccontextmanager
async def replaying(exchanges: list[dict[str, Any]]) -> AsyncIterator[tuple[KubeServer, list[str]]]:
    """Replay the recorded answers of each path in order. Yields the server, and requests that differed from the recording."""
    left = {path: [one for one in exchanges if one["path"] == path] for path in {one["path"] for one in exchanges}}
    unlike: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        if not left[request.path]:
            unlike.append(f"{request.path}: one more request, {dict(request.query)}")
            await asyncio.Future()
        told = left[request.path].pop(0)
        if dict(request.query) != told["query"]:
            unlike.append(f"{request.path}: {dict(request.query)} and not {told['query']}")
        if "status" not in told:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        headers = {name: value for name, value in told["headers"].items() if name != "Transfer-Encoding"}
        response = web.StreamResponse(status=told["status"], headers=headers)
        await response.prepare(request)
        for chunk in told["chunks"]:
            await response.write(chunk.encode())
        if told["end"] == "client":  # the publisher ended it, or it was the end of the recording
            await asyncio.Future()
        if told["end"] == "cut":
            assert request.transport is not None
            request.transport.abort()
        return response

    application = web.Application()
    for path in left:
        application.router.add_get(path, answer)
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    kube = KubeServer()
    kube.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield kube, unlike
        assert not any(left.values()), "all that was told was asked for"
    finally:
        await runner.cleanup()


async def test_the_recorded_api_server_is_followed(serve: Any, tmp_path: Path, recording: Any) -> None:
    """Pages, changes, bookmarks, watches that the server ends, and one that it cannot resume."""
    said = "".join(chunk for one in recording["exchanges"] for chunk in one.get("chunks", ()))
    for kind in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR"):
        assert f'{{"type":"{kind}","object":' in said
    settings = {"page": recording["page"], "watch_s": recording["watch_s"]}
    async with (
        replaying(recording["exchanges"]) as (kube, unlike),
        serve() as at,
        publishing(kube, at, tmp_path, **settings),
    ):

        async def published() -> bool:
            records = (await at.store.snapshot(Kind.SERVICE, "b")).records
            specs = sorted((msgspec.to_builtins(record.spec) for record in records), key=lambda spec: spec["name"])
            return bool(specs == recording["published"])

        await stored(at.store, published)
    assert unlike == []


def shape(value: Any) -> Any:
    """Return the structure of a value: types by key, and of a list only its first item."""
    match value:
        case dict():
            return {key: shape(item) for key, item in value.items()}
        case list():
            return [shape(value[0])] if value else []
    return type(value).__name__


def frame(told: dict[str, Any]) -> Any:
    """Return the structure without the objects themselves: those of the test server have only some of the fields."""
    told = json.loads(json.dumps(told))
    if "items" in told:
        told["items"] = [sorted(item.keys() & {"kind", "apiVersion", "metadata"}) for item in told["items"]]
    elif "object" in told and told["type"] != "ERROR":
        kept = ("kind", "apiVersion", "metadata")
        told["object"] = {key: told["object"][key] for key in kept if key in told["object"]}
        told["object"]["metadata"] = {
            key: value
            for key, value in told["object"]["metadata"].items()
            if key == "resourceVersion" or (told["type"] == "BOOKMARK")
        }
    return shape(told)


async def test_the_test_servers_answers_have_the_structure_of_real_ones(recording: Any) -> None:
    headers = {"Authorization": "Bearer t0ken"}
    async with kube_server() as kube, aiohttp.ClientSession(headers=headers) as session:

        async def ask(path: str, **more: Any) -> tuple[int, str, str]:
            async with session.get(kube.url + path, **more) as answer:
                return answer.status, answer.content_type, await answer.text()

        for name in ("orders", "cart", "late"):
            put_service(kube, name)
        old = kube.version
        first = json.loads((await ask("/api/v1/services?limit=1"))[2])
        last = json.loads((await ask("/api/v1/services"))[2])
        real = {
            json.dumps(frame(json.loads("".join(one["chunks"]))))
            for one in recording["exchanges"]
            if one["path"] == "/api/v1/services" and "limit" in one["query"]
        }
        kube.page = 3
        last = json.loads((await ask("/api/v1/services"))[2])
        assert {json.dumps(frame(first)), json.dumps(frame(last))} <= real

        real_lines = {}
        for one in recording["exchanges"]:
            if "watch" in one["query"]:
                for line in "".join(one["chunks"]).splitlines():
                    told = json.loads(line)
                    real_lines[told["type"]] = frame(told)
        put_service(kube, "orders")
        put_service(kube, "new")
        kube.delete("services", "shop", "new")
        kube.bookmark()
        query = f"?watch=true&allowWatchBookmarks=true&timeoutSeconds=1&resourceVersion={old}"
        status, content_type, text = await ask(f"/api/v1/services{query}")
        assert (status, content_type) == (200, "application/json")
        lines = {line["type"]: frame(line) for line in map(json.loads, text.splitlines())}
        kube.compact()
        (gone,) = (await ask(f"/api/v1/services{query}"))[2].splitlines()
        lines["ERROR"] = frame(json.loads(gone))
        assert lines == real_lines

        asked = recording["asked"]
        for question, answer in (
            (
                "a continuation that is too old",
                await ask(f"/api/v1/services?limit=1&continue={first['metadata']['continue']}"),
            ),
            ("a version that is none", await ask("/api/v1/services?watch=true&resourceVersion=never")),
            ("a token that is unknown", await ask("/api/v1/services", headers={"Authorization": "Bearer no"})),
        ):
            real_answer = asked[question]
            assert answer[:2] == (real_answer["status"], real_answer["type"])
            mine, its = json.loads(answer[2]), json.loads(real_answer["body"])
            assert shape(mine) == shape(its), question
            for field in ("kind", "apiVersion", "status", "reason", "code"):
                assert mine.get(field) == its.get(field), question


@asynccontextmanager
async def over_tls(folder: Path) -> AsyncIterator[tuple[KubeServer, Path]]:
    """Run the test server over TLS. Yields the file of its CA, too."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(folder / "ca.crt")
    async with kube_server(context) as kube:
        yield kube, folder / "ca.crt"


@pytest.mark.interop
@pytest.mark.needs("kubectl")
async def test_kubectl_accepts_the_test_server(tmp_path: Path) -> None:
    async with over_tls(tmp_path) as (kube, authority):
        for name in ("orders", "cart", "late"):
            put_service(kube, name)
        put_slice(kube, "orders-1", "orders", "10.1.0.1")
        command = ["kubectl", "--server", kube.url, "--certificate-authority", str(authority), "--token", kube.token]
        command += ["--kubeconfig", "/dev/null", "--cache-dir", str(tmp_path / "cache"), "get", "--all-namespaces"]

        listed = await asyncio.create_subprocess_exec(
            *command, "services,endpointslices", "--chunk-size=1", "-o", "name", stdout=asyncio.subprocess.PIPE
        )
        names, _ = await listed.communicate()
        assert listed.returncode == 0
        assert sorted(names.decode().split()) == [
            "endpointslice.discovery.k8s.io/orders-1",
            *(f"service/{name}" for name in ("cart", "late", "orders")),
        ]
        assert sum("continue" in query for _, query in kube.asked) == 2

        watching = await asyncio.create_subprocess_exec(
            *command, "services", "--watch-only", "--output-watch-events", "-o", "json", stdout=asyncio.subprocess.PIPE
        )
        assert watching.stdout is not None
        try:
            await kube.until(lambda: kube.watches == 1)
            put_service(kube, "orders")
            put_service(kube, "new")
            kube.delete("services", "shop", "cart")
            decoder, text, told = json.JSONDecoder(), "", []  # type: ignore[var-annotated]
            async with asyncio.timeout(LIMIT_S):
                while len(told) < 3:
                    text += (await watching.stdout.read(65536)).decode()
                    while text.strip():
                        try:
                            event, end = decoder.raw_decode(text.lstrip())
                        except ValueError:
                            break
                        text = text.lstrip()[end:]
                        told.append((event["type"], event["object"]["metadata"]["name"]))
            assert told == [("MODIFIED", "orders"), ("ADDED", "new"), ("DELETED", "cart")]
        finally:
            watching.kill()
            await watching.wait()


@pytest.mark.interop
@pytest.mark.needs("kubectl")
async def test_kubectl_shows_the_events_of_a_service(serve: Any, tmp_path: Path) -> None:
    """kubectl finds them by the fields of the Service, and can create and patch them as a publisher does."""
    async with over_tls(tmp_path) as (kube, authority), serve() as at:
        put_service(kube, "orders", annotations={"crossnet.io/export": "htps"})
        async with publishing(kube, at, tmp_path, ca_file=authority):
            await kube.until(lambda: len(kube.found("events")) == 1)
        command = ["kubectl", "--server", kube.url, "--certificate-authority", str(authority), "--token", kube.token]
        command += ["--kubeconfig", "/dev/null", "--cache-dir", str(tmp_path / "cache"), "--namespace", "shop"]

        async def kubectl(*arguments: str) -> str:
            process = await asyncio.create_subprocess_exec(
                *command, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
            )
            async with asyncio.timeout(LIMIT_S):
                said, _ = await process.communicate()
            assert process.returncode == 0, said.decode()
            return said.decode()

        described = await kubectl("describe", "service", "orders")
        (line,) = (line for line in described.splitlines() if "UnknownPort" in line)
        assert line.split()[0] == "Warning"
        assert "crossnet-publisher" in line
        assert "'htps'; it has https" in line

        (event,) = kube.found("events")
        event = {**event, "kind": "Event", "apiVersion": "v1", "metadata": {"namespace": "shop", "name": "another"}}
        (tmp_path / "event.json").write_text(json.dumps(event))
        assert "created" in await kubectl("create", "--validate=false", "-f", str(tmp_path / "event.json"))
        assert "patched" in await kubectl("patch", "event", "another", "--type=merge", "-p", '{"count": 7}')
        assert "(x7 over" in await kubectl("describe", "service", "orders")


@pytest.mark.interop
@pytest.mark.needs("kubectl")
async def test_kubectl_reads_and_applies_service_exports(serve: Any, tmp_path: Path) -> None:
    async with over_tls(tmp_path) as (kube, authority), serve() as at:
        kube.put("serviceexports", "shop", "orders")
        put_service(kube, "orders", annotations={})
        async with publishing(kube, at, tmp_path, ca_file=authority, service_exports=True):
            await kube.until(lambda: "status" in kube.found("serviceexports")[0])
        command = ["kubectl", "--server", kube.url, "--certificate-authority", str(authority), "--token", kube.token]
        command += ["--kubeconfig", "/dev/null", "--cache-dir", str(tmp_path / "cache"), "--namespace", "shop"]
        process = await asyncio.create_subprocess_exec(
            *command, "get", "serviceexports", "orders", "-o", "json", stdout=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(LIMIT_S):
            said, _ = await process.communicate()
        assert process.returncode == 0
        (condition,) = json.loads(said)["status"]["conditions"]
        assert (condition["type"], condition["status"], condition["reason"]) == ("Valid", "True", "Valid")


async def test_a_cluster_over_tls_is_verified(serve: Any, tmp_path: Path, logged: LogWaiter) -> None:
    async with over_tls(tmp_path) as (kube, authority), serve() as at:
        put_service(kube, "orders")
        async with publishing(kube, at, tmp_path):
            await logged.until("certificate verify failed")
        assert not kube.asked
        async with publishing(kube, at, tmp_path, ca_file=authority):
            await until(at, {"orders.shop.svc.cluster.local": []})


def test_the_manifest_runs_a_publisher_with_no_more_rights_than_it_needs(tmp_path: Path) -> None:
    """The recorded publisher had exactly these rights, except for Events."""
    found = {item["kind"]: item for item in yaml.safe_load_all(MANIFEST.read_text())}
    (tmp_path / "token").write_text("00" * 32 + "\n")
    (tmp_path / "publisher.yaml").write_text(
        found["ConfigMap"]["data"]["publisher.yaml"].replace("/secrets", str(tmp_path))
    )
    assert load(tmp_path / "publisher.yaml").roles == ("publisher",)
    rights = [(rule["apiGroups"], rule["resources"], rule["verbs"]) for rule in found["ClusterRole"]["rules"]]
    assert rights == [
        ([""], ["services"], ["list", "watch"]),
        (["discovery.k8s.io"], ["endpointslices"], ["list", "watch"]),
        ([""], ["events"], ["create", "patch"]),
    ]
