"""A small HTTPS server with mutual TLS, for machines that have neither nginx nor openssl. Standard library only.

usage: python_service.py ADDRESS PORT CERTIFICATE KEY AUTHORITY
"""

import json
import socketserver
import ssl
import sys

REQUEST_TIMEOUT_S = 10.0


class _Visitor(socketserver.BaseRequestHandler):
    request: ssl.SSLSocket

    def handle(self) -> None:
        self.request.settimeout(REQUEST_TIMEOUT_S)
        self.request.do_handshake()
        certificate = self.request.getpeercert() or {}
        subject = ",".join("=".join(pair) for part in certificate.get("subject", ()) for pair in part)
        self.request.recv(16 * 1024)
        body = json.dumps({"subject": subject, "serial": certificate.get("serialNumber")}).encode() + b"\n"
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        self.request.sendall(head.encode() + body)
        self.request.unwrap()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], tls: ssl.SSLContext) -> None:
        super().__init__(address, _Visitor)
        # Each connection does its own handshake, so that a slow one does not block the others.
        self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)


def main() -> None:
    """Serve until killed."""
    address, port, certificate, key, authority = sys.argv[1:]
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    tls.load_verify_locations(authority)
    tls.verify_mode = ssl.CERT_REQUIRED
    with _Server((address, int(port)), tls) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
