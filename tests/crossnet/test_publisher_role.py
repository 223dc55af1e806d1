"""`crossnet run` with a publisher, as a process of its own."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.support.kube_server import kube_server
from tests.support.running import Running, free_port, running
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio

CONFIG = """
network: b
admin: 127.0.0.1:0
discovery: ["http://127.0.0.1:{port}"]
discovery_server: {{listen: "127.0.0.1:{port}"}}
publisher: {{api: "{api}", token: kube.token}}
"""


async def until_ready(process: Running) -> None:
    async def ready() -> bool:
        return (await asyncio.to_thread(process.ask, "/readyz"))[0] == 200

    await eventually(ready, limit_s=20)


async def test_it_is_ready_when_it_has_listed_the_cluster(tmp_path: Path) -> None:
    (tmp_path / "kube.token").write_text("old\n")
    async with kube_server() as kube:
        metadata = {"annotations": {"crossnet.io/export": "true"}}
        kube.put("services", "shop", "orders", metadata=metadata, spec={"ports": [{"port": 8443}]})
        with running(tmp_path, CONFIG.format(port=free_port(), api=kube.url)) as process:
            await asyncio.to_thread(process.wait_for, "started")
            await asyncio.to_thread(process.wait_for, "discovery is there")
            status, body = await asyncio.to_thread(process.ask, "/readyz")
            assert (status, json.loads(body)["waiting_for"]) == (503, ["a first list of the cluster"])
            (tmp_path / "kube.token").write_text("t0ken\n")  # as the kubelet does, before the old one ends
            await until_ready(process)

            async def published() -> bool:
                return "orders.shop.svc.cluster.local" in (await asyncio.to_thread(process.ask, "/mesh"))[1]

            await eventually(published, limit_s=20)
