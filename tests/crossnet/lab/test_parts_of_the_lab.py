"""The lab's smaller parts."""

import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509

from crossnet.config.file import load
from crossnet.lab.account import Account, Check, Hop
from crossnet.lab.certificates import Authority
from crossnet.lab.parts import Parts
from crossnet.lab.program import Program, ProgramError
from crossnet.lab.service import Seen, choose, seen
from crossnet.lab.topology import Loopback, TopologyError


def test_certificates_are_taken_by_openssl(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server = authority.server(
        "s", "a service", ["*.b.svc.mesh.internal", "_8443._10-1-0-5._b.svc.mesh.internal", "10.0.0.1"]
    )
    client = authority.client("c", "a client")
    tls = ssl.create_default_context(cafile=str(authority.path))
    tls.load_cert_chain(server.certificate, server.key)
    tls.load_cert_chain(client.certificate, client.key)
    made = x509.load_pem_x509_certificate(server.certificate.read_bytes())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["*.b.svc.mesh.internal", "_8443._10-1-0-5._b.svc.mesh.internal"]
    assert made.serial_number == server.serial != client.serial
    assert (server.key.stat().st_mode & 0o777) == 0o600


@pytest.mark.parametrize("coturn", [False, True])
def test_every_configuration_of_the_lab_is_good(tmp_path: Path, coturn: bool) -> None:
    parts = Parts(tmp_path, Loopback().plan, Authority(tmp_path), coturn)
    for part in (*parts.names, "operator"):
        load(parts.path(part))
    assert ("turn" in parts.names) is not coturn
    assert parts.turn_password in " ".join(parts.coturn_command())


def test_the_client_certificate_is_read_from_every_kind_of_service(tmp_path: Path) -> None:
    client = Authority(tmp_path).client("c", "a client")
    pem = client.certificate.read_text()
    assert seen(f"<pre>ciphers\nClient certificate\n{pem}</pre>") == Seen("CN=a client", client.serial)
    assert seen('HTTP/1.1 200 OK\r\n\r\n{"subject":"CN=x","serial":"0A","sni":"y"}\n') == Seen("CN=x", 10)
    assert seen('{"subject":"CN=x","serial":null}') is None
    assert seen("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----") is None
    assert seen("") is None


def test_a_service_that_is_not_installed_cannot_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert choose("auto") == "python"
    with pytest.raises(TopologyError, match="nginx is not installed"):
        choose("nginx")


def test_a_program_that_ends_early_is_reported_with_its_log(tmp_path: Path) -> None:
    program = Program("x", [sys.executable, "-c", "print('last words'); raise SystemExit(3)"], tmp_path)
    program.start()
    with pytest.raises(ProgramError, match=r"x ended with exit code 3:\n    last words"):
        program.wait_until("ready", lambda: False)
    program.end()


def test_a_program_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ProgramError, match="no-such-program"):
        Program("x", ["no-such-program"], tmp_path).start()


def test_a_program_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    program = Program("x", [sys.executable, "-c", script], tmp_path, stop_timeout_s=0.3)
    program.start()
    program.wait_until("up", lambda: program.lines() == ["up"])
    program.ask_to_end()
    program.end()
    assert subprocess.run(["ps", "-p", str(program.pid)], capture_output=True, check=False).returncode == 1


def test_an_account_fails_with_any_check_and_shows_it() -> None:
    account = Account(mode="m")
    assert not account.ok
    account.checks.append(Check(what="first", ok=True))
    account.hops.append(Hop(part="relay", address="10.0.0.1:443", did="reads", ms=1.25))
    assert account.ok
    account.checks.append(Check(what="second", ok=False, detail="why"))  # type: ignore[unreachable]
    text = "\n".join(account.lines(every_check=False))
    assert "FAILED  second: why" in text
    assert "first" not in text
    assert text.splitlines()[-1].startswith("FAILED: 1 of 2 checks")
    assert "1 relay  10.0.0.1:443  reads      1.2 ms" in text
