"""A discovery server whose disk is full: it refuses writes, logs why, and keeps serving everything else."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Loopback, Mesh, running_mesh
from tests.support.talk import talking

pytestmark = pytest.mark.anyio

DISK_BYTES = 1 << 20
LEASE_S = 10.0


def service(number: int) -> list[str]:
    """Return the arguments that write a record of about 20 kB."""
    ports = {str(port): [f"10.1.{port % 250}.{host}:{port}" for host in range(1, 100)] for port in range(8000, 8010)}
    spec = {"name": f"big-{number}.shop.svc.cluster.local", "ports": ports}
    return ["put", "service", f"big-{number}", json.dumps(spec)]


@pytest.mark.slow
@pytest.mark.needs("netns", "unshare", "mount")
async def test_a_full_disk_stops_only_writes(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()

    def on_the_disk(document: dict[str, Any]) -> None:
        document["discovery_server"]["store"] = f"sqlite:{disk}/discovery.db"

    # A mount namespace of its own: the disk disappears with the process.
    script = f'mount -t tmpfs -o size={DISK_BYTES} tmpfs "$0" && exec "$@"'
    prefix = ["unshare", "--mount", "--", "sh", "-c", script, str(disk)]
    mesh = Mesh(tmp_path, Loopback(), changes={"discovery": on_the_disk}, prefixes={"discovery": prefix})
    with running_mesh(mesh):
        inside = Path(f"/proc/{mesh['discovery'].pid}/root{disk}")
        async with talking(mesh) as talk:
            assert mesh.records_command(*service(0)).returncode == 0
            fill(inside / "filler")
            refused = mesh.records_command(*service(1))
            assert refused.returncode == 1
            assert refused.stderr.startswith("crossnet records: unavailable: the store cannot be reached or written")
            (why,) = {event["why"] for event in mesh.events("discovery", "the store failed")}
            assert "full" in why
            # Reads and leases still work after longer than an unrenewed lease lasts.
            await asyncio.sleep(LEASE_S + 1)
            assert {"relay", "turn", "allocation"} < {record["kind"] for record in mesh.records_at_the_server()}
            assert mesh.records_command("get", "service", "big-0").returncode == 0
            assert mesh.records_command("get", "service", "big-1").returncode == 1
            await talk.at_once(5)
            (inside / "filler").unlink()
            assert mesh.records_command(*service(1)).returncode == 0
            assert mesh.ready("discovery")
            await talk.at_once(5)


def fill(path: Path) -> None:
    """Fill the disk with this file."""
    with path.open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(4096))
