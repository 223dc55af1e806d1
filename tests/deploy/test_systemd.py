"""The resolver's units: systemd's verdict on them, and the process itself on port 53 with exactly their capabilities.

systemd is not the first process here, so its part is played by setpriv: a user that owns nothing, the unit's capabilities and
no others, no new privileges; in a network namespace of its own, where port 53 is free and as privileged as anywhere.
"""

import json
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
NAMES = ["crossnet-dns.service", "crossnet-dns@.service"]
OWN = "p8443-10-1-0-5.b.svc.mesh.internal"
NOBODY = "65534"
CONFIG = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
drain: 0
dns: {listen: "127.0.0.1:53", upstream: 127.0.0.2, search: [], loop_probe: false}
"""
MESH = """
networks: [{id: a}, {id: b}]
relays: [{network: a, id: relay-1, addresses: ["10.0.0.9"], ports: [443]}]
"""
SCRIPT = """
set -eu
ip link set lo up
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/source /mnt/python /mnt/packages /mnt/conf
mount --bind {source} /mnt/source
mount --bind {python} /mnt/python
mount --bind {packages} /mnt/packages
cp {conf}/*.yaml /mnt/conf
chmod 644 /mnt/conf/*
cd /
umask {umask}
export LD_LIBRARY_PATH=/mnt/python/lib PYTHONHOME=/mnt/python PYTHONPATH=/mnt/source:/mnt/packages PYTHONDONTWRITEBYTECODE=1
setpriv --reuid {user} --regid {user} --clear-groups --no-new-privs --bounding-set {bounding} \
    --inh-caps {ambient} --ambient-caps {ambient} -- /mnt/python/bin/python{version} -m {command} >/mnt/log 2>&1 &
pid=$!
tries=0
until dig +tries=1 +timeout=1 +short @127.0.0.1 {own} >/mnt/answer; do
    tries=$((tries + 1))
    [ -d /proc/$pid ] && [ $tries -lt 200 ] || break
    sleep 0.05
done
grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs)' /proc/$pid/status >/mnt/status 2>/dev/null || true
kill -TERM $pid 2>/dev/null || true
wait $pid && code=0 || code=$?
echo "$code"
head -1 /mnt/answer
tr '\\n' ' ' </mnt/status
echo
cat /mnt/log
"""


@dataclass(frozen=True, slots=True)
class Ran:
    """The result of a resolver in the namespace."""

    code: int
    answer: str
    status: dict[str, str]
    log: list[dict[str, str]]


def settings(unit: str) -> dict[str, str]:
    """The unit's settings; each is there once but for Documentation."""
    lines = (UNITS / unit).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def capabilities(names: str) -> str:
    return ",".join(["-all", *("+" + name.removeprefix("CAP_").lower() for name in names.split())])


def run(folder: Path, ambient: str, unit: str = NAMES[0]) -> Ran:
    """Run the unit's command as nobody, with these capabilities and its bounding set."""
    setting = settings(unit)
    command = setting["ExecStart"].replace("/etc/crossnet/", "/mnt/conf/")
    assert command.startswith("/usr/bin/env crossnet run -c /mnt/conf/")
    (folder / "dns.yaml").write_text(CONFIG)
    (folder / "mesh.yaml").write_text(MESH)
    script = SCRIPT.format(
        source=Path(__file__).parents[2],
        python=sys.base_prefix,
        packages=sysconfig.get_path("purelib"),
        version=sysconfig.get_python_version(),
        conf=folder,
        umask=setting["UMask"],
        files=setting["LimitNOFILE"],
        user=NOBODY,
        bounding=capabilities(setting["CapabilityBoundingSet"]),
        ambient=capabilities(ambient),
        command=command.removeprefix("/usr/bin/env "),
        own=OWN,
    )
    # A pid namespace, so that whatever is left ends with the script; nothing is mounted outside a mount namespace.
    unshare = ["unshare", "--net", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child", "sh", "-c", script]
    done = subprocess.run(unshare, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    code, answer, status, *log = done.stdout.splitlines()
    words = status.split()
    keys = [n for n, word in enumerate(words) if word.endswith(":")]
    said = {words[n].rstrip(":"): words[n + 1] for n in keys}
    assert all(line.startswith("{") for line in log), done.stdout
    return Ran(int(code), answer, said, [json.loads(line) for line in log])


NET_BIND_SERVICE = f"{1 << 10:016x}"


@pytest.mark.needs("netns", "setpriv", "dig")
@pytest.mark.netns
def test_the_unit_is_enough_for_port_53_and_grants_nothing_else(tmp_path: Path) -> None:
    ran = run(tmp_path, settings(NAMES[0])["AmbientCapabilities"])
    assert (ran.answer, ran.code) == ("10.0.0.9", 143), ran.log
    assert ran.status == {"Uid": NOBODY, "CapEff": NET_BIND_SERVICE, "CapBnd": NET_BIND_SERVICE, "NoNewPrivs": "1"}


@pytest.mark.needs("netns", "setpriv", "dig")
@pytest.mark.netns
def test_without_the_capability_it_says_what_is_missing(tmp_path: Path) -> None:
    ran = run(tmp_path, "")
    assert ran.code == 1
    (event,) = [event for event in ran.log if event["event"] == "cannot_start"]
    assert event["detail"] == (
        "dns: [Errno 13] cannot listen on 127.0.0.1:53: Permission denied (a port that low takes root or CAP_NET_BIND_SERVICE)"
    )
    assert event["level"] == "error"


@pytest.mark.needs("systemd-analyze")
@pytest.mark.parametrize("unit", NAMES)
def test_systemd_finds_the_units_well_made_and_hardly_exposed(unit: str) -> None:
    verify = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(UNITS / unit)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False, timeout=30)
    assert not [line for line in done.stderr.splitlines() if "crossnet-dns" in line], done.stderr
    # The exposure level, from 0 to 10; a service without settings has 9.6.
    security = ["systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=25", str(UNITS / unit)]
    done = subprocess.run(security, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stdout


def test_both_units_are_the_same_but_for_their_names() -> None:
    one, many = (settings(unit) for unit in NAMES)
    assert {key: value.replace("-%i", "").replace(" %i", "") for key, value in many.items()} == one
    assert one["ExecReload"].endswith("-HUP $MAINPID")
    assert (one["DynamicUser"], one["AmbientCapabilities"]) == ("yes", one["CapabilityBoundingSet"])
