"""Requirements of tests: a real program, or permission to create network namespaces.

A test declares them by a mark, `@pytest.mark.needs("turnserver", "nft")`. If one is missing, the test is skipped with the
reason in the summary. With CI=true it fails instead, because a CI run that silently skips its real peers proves nothing.
"""

import functools
import os
import shutil
import subprocess

# Debian packages of programs whose name differs from that of the package.
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
"""Folders of ip, nft and nginx on Debian, which are not in an ordinary user's PATH."""


def lacking(requirement: str) -> str | None:
    """Return why a requirement is not met, or None if it is.

    `netns` (as root), `userns` (as any user) and `namespaces` (either of them) are determined by trying.
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
