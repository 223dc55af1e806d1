"""The state that a process shows before it serves, while it serves and while it drains."""

import asyncio
from pathlib import Path

import uvloop

from crossnet.app.app import App
from crossnet.app.inspection import Inspection
from crossnet.config.file import load
from discovery.model.mesh import Mesh
from tests.support.running import free_port
from tests.support.waiting import logged

FILE = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:{admin}
drain: 0
keys: {{ab: {{file: ab.key, from: a, to: b}}}}
relay: {{id: relay-1, listen: "127.0.0.1:0", deliver: ["127.0.0.1/32"]}}
"""


def test_a_process_from_its_start_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text("networks: [{id: a}, {id: b}]")
    key = tmp_path / "ab.key"
    key.touch(0o600)
    key.write_text("5a" * 32)
    path = tmp_path / "relay.yaml"
    path.write_text(FILE.format(admin=free_port()))

    async def live() -> None:
        app = App(load(path), ["relay"])
        shown = Inspection(app)
        assert shown.waiting_for() == ["the start of all roles"]
        assert (shown.view(), shown.streams(), shown.stale_s()) == (Mesh.EMPTY, {}, None)
        async with asyncio.TaskGroup() as group:
            with logged("crossnet", "started") as started:
                group.create_task(app.serve())
                await started.wait()
            assert shown.waiting_for() == []
            assert shown.view().networks == {"a", "b"}
            assert (shown.streams(), shown.ended_streams()) == ({"relay": []}, {"relay": []})
            assert not shown.end_stream(bytes(16))
            status = shown.status()
            assert (status["network"], status["waiting_for"]) == ("a", [])
            app.stop()
            assert shown.waiting_for() == ["the end: draining"]
        assert "5a5a" not in str(shown.effective_config())

    uvloop.run(live())
