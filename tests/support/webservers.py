"""Real web servers that require a PROXY header and answer with the addresses in it.

    with webserver("nginx", folder, certificate) as port:

The answer to any request is one line: the client's address and port, and the address that the client connected to.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from crossnet.lab.certificates import Credential
from tests.support.processes import Part
from tests.support.running import free_port
from tests.support.waiting import listens, wait_until

WEBSERVERS = [
    pytest.param("nginx", marks=pytest.mark.needs("nginx")),
    pytest.param("haproxy", marks=pytest.mark.needs("haproxy")),
]

_NGINX = """user root root;
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/nginx-body;
    proxy_temp_path {folder}/nginx-proxy;
    fastcgi_temp_path {folder}/nginx-fastcgi;
    uwsgi_temp_path {folder}/nginx-uwsgi;
    scgi_temp_path {folder}/nginx-scgi;
    server {{
        listen {address}:{port} {tls} proxy_protocol;
        {certificate}
        location / {{
            default_type text/plain;
            return 200 '$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr\\n';
        }}
    }}
}}
"""

_HAPROXY = """
global
    log stdout format raw local0 warning
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
frontend f
    bind {address}:{port} accept-proxy {tls}
    http-request return status 200 content-type text/plain lf-string "%[src] %[src_port] %[dst]\\n"
"""


@contextlib.contextmanager
def webserver(kind: str, folder: Path, certificate: Credential | None = None) -> Iterator[int]:
    """Run one on loopback while the block runs, with TLS if there is a certificate. Yields its port."""
    folder.mkdir()
    port = free_port()
    fields = {"folder": folder, "address": "127.0.0.1", "port": port, "tls": "", "certificate": ""}
    if kind == "nginx":
        path = folder / "nginx.conf"
        if certificate is not None:
            fields["tls"] = "ssl"
            fields["certificate"] = f"ssl_certificate {certificate.certificate}; ssl_certificate_key {certificate.key};"
        path.write_text(_NGINX.format(**fields))
        command = ["nginx", "-p", str(folder), "-c", str(path)]
    else:
        path = folder / "haproxy.cfg"
        if certificate is not None:
            both = folder / "both.pem"
            both.write_bytes(certificate.certificate.read_bytes() + certificate.key.read_bytes())
            fields["tls"] = f"ssl crt {both}"
        path.write_text(_HAPROXY.format(**fields))
        command = ["haproxy", "-db", "-f", str(path)]
    program = Part(kind, command, folder)
    try:
        program.start()
        wait_until(
            lambda: listens("127.0.0.1", port) or not program.alive, what=f"{kind} listens", details=program.tail
        )
        assert program.alive, program.tail()
        yield port
    finally:
        program.kill()
