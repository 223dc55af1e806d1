"""Unmodified clients: curl, openssl s_client and Python's ssl, which request the same names."""

import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dnslib import QTYPE, RCODE, DNSError, DNSRecord

from crossnet.lab.certificates import Credential
from crossnet.lab.service import Seen, seen
from crossnet.lab.topology import Topology

CLIENTS = ("curl", "openssl", "python")
REQUEST_TIMEOUT_S = 15.0
DNS_TIMEOUT_S = 3.0
MAX_OUTPUT = 256 * 1024

_UNRECOGNIZED = re.compile(r"unrecognized[ _]name|alert number 112", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsAnswer:
    """An answer of dnsgw."""

    rcode: str
    addresses: tuple[str, ...]
    ttl_s: int | None
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One client's request to one name."""

    client: str
    name: str
    ms: float
    status: int
    """The client's exit code. 0: it has verified the certificate and received an answer."""
    seen: Seen | None
    unrecognized_name: bool
    """It was refused with TLS alert unrecognized_name(112)."""
    said: str
    """The most relevant line of its error output."""


class Clients:
    """Runs clients in network a."""

    def __init__(self, topology: Topology, authority: Path, client: Credential, folder: Path) -> None:
        self._topology = topology
        self._authority = authority
        self._client = client
        self._folder = folder
        self._port = topology.plan.relay_port
        self.resolve_themselves = topology.mode == "namespaces"
        """Whether clients resolve the name themselves; else the lab asks dnsgw and tells them where to connect."""

    @property
    def available(self) -> list[str]:
        """The clients that are installed."""
        return [client for client in CLIENTS if client == "python" or shutil.which(client)]

    def versions(self) -> dict[str, str]:
        """Return the name and version of each client."""
        found = {"python": f"Python {sys.version.split()[0]} ssl"}
        for client, option in (("curl", "--version"), ("openssl", "version")):
            if client in self.available:
                told = subprocess.run([client, option], capture_output=True, text=True, timeout=10, check=False).stdout
                found[client] = " ".join(told.split()[:2])
        found["openssl"] = found.get("openssl", "openssl").replace("OpenSSL", "openssl s_client")
        return found

    def ask(self, client: str, name: str, relay: str | None = None) -> Attempt:
        """Run a client that requests a name. `relay`: connect to this address instead of resolving the name."""
        command, given = self._command(client, name, relay)
        started = time.monotonic()
        try:
            done = subprocess.run(
                self._topology.command("a", command),
                input=given,
                capture_output=True,
                timeout=REQUEST_TIMEOUT_S,
                cwd=self._folder,
                check=False,
            )
            status, output, complaint = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired:
            status, output, complaint = 124, b"", f"no end within {REQUEST_TIMEOUT_S:g} s".encode()
        ms = (time.monotonic() - started) * 1000
        answer = output[:MAX_OUTPUT].decode(errors="replace")
        said = complaint[:MAX_OUTPUT].decode(errors="replace")
        found = seen(answer) if status == 0 else None
        return Attempt(
            client=client,
            name=name,
            ms=ms,
            status=status,
            seen=found,
            unrecognized_name=status != 0 and _UNRECOGNIZED.search(said) is not None,
            said=_last_word(said),
        )

    def reach(self, address: str, port: int, timeout_s: float) -> bool:
        """Whether a connection from network a to an address succeeds."""
        script = f"import socket; socket.create_connection(({address!r}, {port}), {timeout_s}).close()"
        command = self._topology.command("a", [sys.executable, "-I", "-c", script])
        return subprocess.run(command, capture_output=True, timeout=REQUEST_TIMEOUT_S, check=False).returncode == 0

    def resolve(self, name: str) -> DnsAnswer:
        """Ask dnsgw for a name's IPv4 addresses. Raises OSError without a usable answer."""
        question = DNSRecord.question(name, "A")
        started = time.monotonic()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.settimeout(DNS_TIMEOUT_S)
            asking.connect((self._topology.plan.dns, self._topology.plan.dns_port))
            asking.send(question.pack())
            data = asking.recv(4096)
        ms = (time.monotonic() - started) * 1000
        try:
            answer = DNSRecord.parse(data)
        except DNSError as error:
            raise OSError(f"dnsgw's answer cannot be read: {error}") from error
        records = [record for record in answer.rr if QTYPE[record.rtype] == "A"]
        return DnsAnswer(
            rcode=str(RCODE[answer.header.rcode]),
            addresses=tuple(str(record.rdata) for record in records),
            ttl_s=records[0].ttl if records else None,
            ms=ms,
        )

    def command_line(self, client: str, name: str, relay: str | None) -> str:
        """Return what a person would type in network a."""
        command, _ = self._command(client, name, relay)
        return " ".join(command)

    def _command(self, client: str, name: str, relay: str | None) -> tuple[list[str], bytes | None]:
        """Return the command, and its input."""
        authority, certificate, key = (
            str(path) for path in (self._authority, self._client.certificate, self._client.key)
        )
        port = str(self._port)
        if client == "curl":
            url = f"https://{name}/" if self._port == 443 else f"https://{name}:{port}/"
            elsewhere = [] if relay is None else ["--connect-to", f"{name}:{port}:{relay}:{port}"]
            command = ["curl", "-sS", "--noproxy", "*", "--max-time", "10", *elsewhere]
            return [*command, "--cacert", authority, "--cert", certificate, "--key", key, url], None
        if client == "openssl":
            command = ["openssl", "s_client", "-quiet", "-connect", f"{relay or name}:{port}", "-servername", name]
            command += ["-verify_hostname", name, "-verify_return_error", "-CAfile", authority]
            request = f"GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n"
            return [*command, "-cert", certificate, "-key", key], request.encode()
        script = str(Path(__file__).with_name("python_client.py"))
        return [sys.executable, "-I", script, relay or name, port, name, authority, certificate, key], None


def _last_word(said: str) -> str:
    """Return the most relevant line of a client's error output."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if _UNRECOGNIZED.search(line) or "error" in line.lower()]
    return (telling or lines or [""])[0][:200]
