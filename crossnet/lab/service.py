"""The mutual-TLS service in network b: nginx, else openssl s_server, else Python's ssl. It reports the client certificate."""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from crossnet.lab.certificates import Credential
from crossnet.lab.topology import TopologyError

KINDS = ("nginx", "openssl", "python")
MAX_ANSWER_BYTES = 64 * 1024

NGINX = """user root root;
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/nginx-body;
    proxy_temp_path {folder}/nginx-proxy;
    fastcgi_temp_path {folder}/nginx-fastcgi;
    uwsgi_temp_path {folder}/nginx-uwsgi;
    scgi_temp_path {folder}/nginx-scgi;
    server {{
        listen {address}:{port} ssl;
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_certificate {server.certificate};
        ssl_certificate_key {server.key};
        ssl_client_certificate {authority};
        ssl_verify_client on;
        location / {{
            default_type application/json;
            return 200 '{{"subject":"$ssl_client_s_dn","serial":"$ssl_client_serial","sni":"$ssl_server_name"}}\\n';
        }}
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """The client certificate that the service saw."""

    subject: str
    serial: int


def choose(wanted: str) -> str:
    """Return the kind of service to run: the wanted one, or the first one installed. Raises TopologyError."""
    if wanted != "auto":
        if wanted != "python" and shutil.which(wanted) is None:
            raise TopologyError(f"{wanted} is not installed")
        return wanted
    return next(kind for kind in KINDS if kind == "python" or shutil.which(kind) is not None)


def command(kind: str, address: str, port: int, server: Credential, authority: Path, folder: Path) -> list[str]:
    """Return the command that runs the service in the foreground."""
    if kind == "nginx":
        path = folder / "nginx.conf"
        path.write_text(NGINX.format(folder=folder, address=address, port=port, server=server, authority=authority))
        return ["nginx", "-p", str(folder), "-c", str(path)]
    if kind == "openssl":
        return [
            *("openssl", "s_server", "-www", "-accept", f"{address}:{port}"),
            *("-cert", str(server.certificate), "-key", str(server.key)),
            *("-CAfile", str(authority), "-Verify", "1", "-verify_return_error"),
        ]
    script = Path(__file__).with_name("python_service.py")
    return [
        *(sys.executable, "-I", str(script), address, str(port)),
        *(str(server.certificate), str(server.key), str(authority)),
    ]


def seen(answer: str) -> Seen | None:
    """Parse the client certificate in the service's answer; None if it has none.

    nginx and our Python service answer with JSON, s_server with a page that contains the certificate.
    """
    answer = answer[:MAX_ANSWER_BYTES]
    for text in re.findall(r'\{"subject".*\}', answer):
        try:
            fields = json.loads(text)
            return Seen(str(fields["subject"]), int(fields["serial"], 16))
        except (ValueError, KeyError, TypeError):
            continue
    found = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", answer, re.DOTALL)
    if found is None:
        return None
    try:
        certificate = x509.load_pem_x509_certificate(found[0].encode())
    except ValueError:
        return None
    return Seen(certificate.subject.rfc4514_string(), certificate.serial_number)
