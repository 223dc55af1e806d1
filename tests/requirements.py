"""What a test may need of the machine: a real program, or the right to make network namespaces.

A test says so by a mark, `@pytest.mark.needs("turnserver", "nft")`. Where something is missing the test is skipped
with the reason in the summary; with CI=true that is a failure, because a CI that silently skips its real peers proves
nothing.
"""

import functools
import os
import shutil
import subprocess

# Which Debian package brings a program whose name is not the package's own.
PACKAGES = {
    "turnserver": "coturn",
    "turnutils_uclient": "coturn",
    "nft": "nftables",
    "ip": "iproute2",
    "tc": "iproute2",
    "dig": "bind9-dnsutils",
    "delv": "bind9-dnsutils",
    "kdig": "knot-dnsutils",
    "drill": "ldnsutils",
    "dnsmasq": "dnsmasq-base",
    "systemd-analyze": "systemd",
    "etcd": "etcd-server",
    "kubectl": "kubernetes-client",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "musl-gcc": "musl-tools",
}

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
"""Debian keeps ip, nft, nginx and turnserver's neighbours where an ordinary user's PATH does not look."""


def lacking(requirement: str) -> str | None:
    """Return why a requirement is not met here, None if it is.

    `netns` (as root), `userns` (as anybody) and `namespaces` (one of the two) are found out by doing.
    """
    if requirement == "namespaces":
        return lacking("userns") if lacking("netns") else None
    if requirement == "netns":
        return _namespaces_refused(())
    if requirement == "userns":
        return _namespaces_refused(("--user", "--map-root-user"))
    if shutil.which(requirement) is None:
        return f"{requirement} is not installed: apt-get install {PACKAGES.get(requirement, requirement)}"
    return None


@functools.cache
def _namespaces_refused(options: tuple[str, ...]) -> str | None:
    if not options and os.geteuid() != 0:
        return "network namespaces need root"
    command = ["unshare", *options, "--net", "--mount", "ip", "link", "set", "lo", "up"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no network namespace: {error}"
    return None if done.returncode == 0 else f"no network namespace: {done.stderr.strip()}"
