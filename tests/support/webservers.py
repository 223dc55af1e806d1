"""Real web servers that expect a PROXY header and answer with the addresses in it.

    with webserver("nginx", folder, certificate) as port:

The answer to any request is one line: the client's address and port, and the address that the client had connected to.
"""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crossnet.lab.certificates import Credential
from tests.support.processes import LIMIT_S, LOOK_EVERY_S, Part
from tests.support.running import free_port

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
    """Run a server on loopback while the block runs, with TLS if there is a certificate; yield its port."""
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
        deadline = time.monotonic() + LIMIT_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert program.alive, program.tail()
            assert time.monotonic() < deadline, program.tail()
            time.sleep(LOOK_EVERY_S)
        yield port
    finally:
        program.kill()
