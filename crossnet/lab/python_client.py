"""An ordinary client with Python's ssl, which knows nothing of crossnet. Standard library only.

usage: python_client.py CONNECT-TO PORT NAME AUTHORITY CERTIFICATE KEY
"""

import socket
import ssl
import sys

TIMEOUT_S = 10.0


def main() -> int:
    """Print the answer, or on stderr why there is none."""
    connect_to, port, name, authority, certificate, key = sys.argv[1:]
    tls = ssl.create_default_context(cafile=authority)
    tls.load_cert_chain(certificate, key)
    try:
        with (
            socket.create_connection((connect_to, int(port)), timeout=TIMEOUT_S) as connection,
            tls.wrap_socket(connection, server_hostname=name) as stream,
        ):
            stream.sendall(f"GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
            while data := stream.recv(16 * 1024):
                sys.stdout.buffer.write(data)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
