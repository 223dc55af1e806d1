"""Records the requests of a publisher and the answers of a real Kubernetes API. Tests replay them without an API server.

    python -m tests.discovery.publisher.record --api https://127.0.0.1:6443 --ca ca.crt --admin-token FILE --token FILE \
        --restart COMMAND --compact COMMAND --version 1.20.2

It changes the cluster (namespaces shop and bank, of which nothing may be left from another time) and writes recording.json:
every request of the publisher with the answer as it came, chunk by chunk; some answers to questions that no publisher should
ask; and what the publisher published in the end. `--token` is what the publisher shows, with no more rights than
deploy/kubernetes/publisher.yaml gives; `--admin-token` is what changes the cluster. COMMANDs restart the API server, which
makes it forget the history that watches resume from, and compact etcd, which makes continuations of lists too old.
"""

import argparse
import asyncio
import json
import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from discovery.client.mesh_file import StaticDiscovery
from discovery.pacing.backoff import Backoff
from discovery.publisher import Publisher, PublisherConfig
from tests.support.waiting import eventually

RECORDING = Path(__file__).with_name("recording.json")
PAGE = 2
WATCH_S = 10
"""Short, and above the two seconds before a watch's end in which a server sends its bookmark."""

LIMIT_S = 90.0
KEPT_HEADERS = ("Content-Type", "Transfer-Encoding", "Cache-Control")


class Recorder:
    """A proxy that forwards each request to the API, and records request and answer."""

    def __init__(self, api: str, tls: ssl.SSLContext | bool, slices: str) -> None:
        self.url = ""
        self.exchanges: list[dict[str, Any]] = []
        self.open = asyncio.Event()
        self.open.set()
        self._api, self._tls, self._slices = api, tls, slices

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve on loopback while the block runs."""
        application = web.Application()
        application.router.add_get("/{path:.*}", self._hand_on)
        runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield
        finally:
            await runner.cleanup()

    async def _hand_on(self, request: web.Request) -> web.StreamResponse:
        await self.open.wait()
        told: dict[str, Any] = {"path": request.path, "query": dict(request.query), "end": "cut"}
        self.exchanges.append(told)
        # Servers before 1.21 have EndpointSlices as v1beta1, whose fields that count here are the same.
        path = request.path.replace("/discovery.k8s.io/v1/", f"/discovery.k8s.io/{self._slices}/")
        headers = {"Authorization": request.headers.get("Authorization", "")}
        response: web.StreamResponse | None = None
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session,
                session.get(self._api + path, params=request.query, headers=headers, ssl=self._tls) as answer,
            ):
                kept = {name: answer.headers[name] for name in KEPT_HEADERS if name in answer.headers}
                told |= {"status": answer.status, "headers": kept, "chunks": [], "end": "open"}
                response = web.StreamResponse(status=answer.status, headers={"Content-Type": kept["Content-Type"]})
                await response.prepare(request)
                piece = b""
                async for data, whole in answer.content.iter_chunks():
                    piece += data
                    if whole or "Transfer-Encoding" not in kept:
                        if piece:
                            told["chunks"].append(piece.decode())
                            await response.write(piece)
                        piece = b""
                told["end"] = "server"
        except asyncio.CancelledError:
            told["end"] = "client"
            raise
        except aiohttp.ClientError:
            told["end"] = "cut"
            if request.transport is not None:
                request.transport.abort()
        return response or web.Response(status=502)


class Cluster:
    """Changes the cluster, and sends requests that a publisher would not send."""

    def __init__(self, api: str, tls: ssl.SSLContext | bool, token: str, slices: str, session: Any) -> None:
        self._api, self._tls, self._token, self._session = api, tls, token, session
        self._slices = slices

    async def ask(self, path: str, *, method: str = "GET", token: str | None = None, body: object = None) -> Any:
        """Send one request. Returns status, content type and body."""
        headers = {"Authorization": f"Bearer {self._token if token is None else token}"}
        async with self._session.request(method, self._api + path, headers=headers, json=body, ssl=self._tls) as answer:
            return {"path": path, "status": answer.status, "type": answer.content_type, "body": await answer.text()}

    async def do(self, method: str, path: str, body: object = None) -> Any:
        """Send a request that must succeed."""
        answer = await self.ask(path, method=method, body=body)
        if answer["status"] not in (200, 201, 202):
            raise SystemExit(f"{method} {path}: {answer['status']} {answer['body'][:500]}")
        return json.loads(answer["body"])

    async def namespace(self, name: str) -> None:
        await self.do("POST", "/api/v1/namespaces", {"metadata": {"name": name}})

    async def service(self, namespace: str, name: str, export: str | None = "true", **spec: Any) -> None:
        """Create or replace a Service."""
        path = f"/api/v1/namespaces/{namespace}/services"
        metadata: dict[str, Any] = {"name": name, "labels": {"app": name}}
        if export is not None:
            metadata["annotations"] = {"crossnet.io/export": export, "crossnet.io/proxy-protocol": "true"}
        ports = [{"name": "https", "port": 8443, "targetPort": 9443}, {"name": "metrics", "port": 9090}]
        body = {"metadata": metadata, "spec": {"ports": ports, "selector": {"app": name}} | spec}
        there = await self.ask(f"{path}/{name}")
        if there["status"] == 404:
            await self.do("POST", path, body)
        else:
            found = json.loads(there["body"])
            metadata["resourceVersion"] = found["metadata"]["resourceVersion"]
            await self.do("PUT", f"{path}/{name}", body | {"spec": found["spec"]})

    async def slice(self, namespace: str, name: str, of: str, *ready: str, waiting: tuple[str, ...] = ()) -> None:
        """Create or replace an EndpointSlice."""
        path = f"/apis/discovery.k8s.io/{self._slices}/namespaces/{namespace}/endpointslices"
        addresses = [(address, True) for address in ready] + [(address, False) for address in waiting]
        body = {
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": of}},
            "addressType": "IPv6" if any(":" in address for address, _ in addresses) else "IPv4",
            "endpoints": [
                {"addresses": [address], "conditions": {"ready": is_ready}} for address, is_ready in addresses
            ],
            "ports": [{"name": "https", "port": 9443}, {"name": "metrics", "port": 9090}],
        }
        if (await self.ask(f"{path}/{name}"))["status"] == 404:
            await self.do("POST", path, body)
        else:
            await self.do("PUT", f"{path}/{name}", body)

    async def delete(self, path: str) -> None:
        await self.do("DELETE", path.replace("discovery.k8s.io/v1/", f"discovery.k8s.io/{self._slices}/"))


def endpoints(discovery: StaticDiscovery) -> dict[str, dict[str, list[str]]]:
    """Return the published endpoints, by name and port."""
    return {record.spec.name: record.spec.ports for record in discovery.mesh.services("b")}


async def until(what: str, holds: Any) -> None:
    await eventually(holds, LIMIT_S)
    print(what, flush=True)


async def command(line: str) -> None:
    process = await asyncio.create_subprocess_shell(line)
    if await process.wait():
        raise SystemExit(f"{line}: exit code {process.returncode}")


async def record(options: argparse.Namespace) -> None:
    """Run the publisher while the cluster is changed, and write the recording."""
    tls = ssl.create_default_context(cafile=options.ca) if options.ca else True
    recorder = Recorder(options.api, tls, options.slices)
    async with recorder.serving(), aiohttp.ClientSession() as session:
        cluster = Cluster(options.api, tls, options.admin_token.read_text().strip(), options.slices, session)
        for namespace in ("shop", "bank"):
            await cluster.namespace(namespace)
        await cluster.service("shop", "orders")
        await cluster.service("shop", "private", None)
        await cluster.service("shop", "cart", "https", clusterIP="None")
        await cluster.service("bank", "ledger", "8443", type="NodePort")
        await cluster.slice("shop", "orders-1", "orders", "10.1.0.1", waiting=("10.1.0.2",))
        await cluster.slice("shop", "orders-2", "orders", "10.1.0.3")
        await cluster.slice("shop", "orders-6", "orders", "fd00::1")
        await cluster.slice("shop", "cart-1", "cart", "10.1.1.1")
        with tempfile.TemporaryDirectory() as folder:
            mesh = Path(folder) / "mesh.yaml"
            mesh.write_text("networks: [{id: b}]\n")
            discovery = StaticDiscovery(mesh, network="b")
            config = PublisherConfig(
                network="b", api=recorder.url, token_file=options.token, page=PAGE, watch_s=WATCH_S
            )
            async with asyncio.TaskGroup() as group:
                running = group.create_task(Publisher(config, discovery, backoff=Backoff(0.2, 0.5)).run())
                await scene(options, cluster, recorder, discovery)
                running.cancel()
        told = recorder.exchanges
        asked = await questions(options, cluster)
    write(options, told, asked, [msgspec.to_builtins(record.spec) for record in discovery.mesh.services("b")])


async def scene(options: argparse.Namespace, cluster: Cluster, recorder: Recorder, discovery: StaticDiscovery) -> None:
    """Change the cluster, and wait after each change until the publisher has applied it."""
    orders, cart, ledger, late = (
        f"{name}.svc.cluster.local" for name in ("orders.shop", "cart.shop", "ledger.bank", "late.shop")
    )

    def watches(end: str) -> int:
        return sum("watch" in one["query"] and one["end"] == end for one in recorder.exchanges)

    def lines(kind: str) -> int:
        return sum(f'"type":"{kind}"' in chunk for one in recorder.exchanges for chunk in one.get("chunks", ()))

    await until("listed", lambda: set(endpoints(discovery)) == {orders, cart, ledger})
    await until("watched", lambda: watches("open") == 2)
    await cluster.slice("shop", "orders-1", "orders", "10.1.0.1", "10.1.0.2")
    await until("an endpoint is ready", lambda: "10.1.0.2:9443" in endpoints(discovery)[orders]["8443"])
    await cluster.service("shop", "cart", None)
    await until("no longer exported", lambda: cart not in endpoints(discovery))
    await cluster.delete("/api/v1/namespaces/bank/services/ledger")
    await until("deleted", lambda: ledger not in endpoints(discovery))
    await until("bookmarks; ended by the server; resumed", lambda: watches("server") == watches("open") == 2)
    assert lines("BOOKMARK") >= 2
    await cluster.delete("/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices/orders-6")
    await until("followed further", lambda: "[fd00::1]:9443" not in endpoints(discovery)[orders]["8443"])
    # Changes while there is no watch, after which the API server loses its history.
    recorder.open.clear()
    await until("ended again", lambda: watches("open") == 0)
    await cluster.delete("/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices/orders-2")
    await cluster.service("shop", "late")
    await command(options.restart)
    recorder.open.set()
    await until("410, and listed anew", lambda: lines("ERROR") == 2 and late in endpoints(discovery))
    await until("what went meanwhile is gone", lambda: "10.1.0.3:9443" not in endpoints(discovery)[orders]["8443"])
    await until("watched anew", lambda: watches("open") == 2)
    await cluster.slice("shop", "late-1", "late", "10.1.2.1")
    await until("and followed", lambda: endpoints(discovery)[late]["8443"] == ["10.1.2.1:9443"])


async def questions(options: argparse.Namespace, cluster: Cluster) -> dict[str, Any]:
    """Send requests that fail, and return the answers."""
    path = "/api/v1/services"
    page = await cluster.do("GET", f"{path}?limit=1")
    going_on = f"{path}?limit=1&continue={page['metadata']['continue']}"
    await cluster.service("shop", "later")
    await command(options.compact)
    publisher = options.token.read_text().strip()
    return {
        "a continuation that is too old": await cluster.ask(going_on),
        "a version that is none": await cluster.ask(f"{path}?watch=true&resourceVersion=never"),
        "a token that is unknown": await cluster.ask(path, token="unknown"),
        "a right that is not given": await cluster.ask("/api/v1/secrets", token=publisher),
        "a kind that is not there": await cluster.ask("/apis/discovery.k8s.io/v0/endpointslices"),
    }


def write(options: argparse.Namespace, exchanges: list[dict[str, Any]], asked: Any, published: Any) -> None:
    """Write the recording with one chunk on each line, so that people can read it."""
    # Of requests without an answer only the first is kept: the number of attempts depends on timing.
    kept = [
        one
        for index, one in enumerate(exchanges)
        if "status" in one
        or not any("status" not in before and before["path"] == one["path"] for before in exchanges[:index])
    ]
    told = {
        "what": f"kube-apiserver {options.version} and the publisher",
        "page": PAGE,
        "watch_s": WATCH_S,
        "exchanges": kept,
        "asked": asked,
        "published": published,
    }
    RECORDING.write_text(json.dumps(told, indent=1) + "\n")
    print(f"{RECORDING}: {len(kept)} exchanges")


def main() -> None:
    """Read the options and record."""
    parser = argparse.ArgumentParser(description="Record a publisher's conversation with a real Kubernetes API.")
    parser.add_argument("--api", required=True)
    parser.add_argument("--ca")
    parser.add_argument("--admin-token", type=Path, required=True)
    parser.add_argument("--token", type=Path, required=True)
    parser.add_argument("--restart", required=True)
    parser.add_argument("--compact", required=True)
    parser.add_argument("--slices", default="v1", choices=["v1", "v1beta1"])
    parser.add_argument("--version", required=True)
    asyncio.run(record(parser.parse_args()))


if __name__ == "__main__":
    main()
