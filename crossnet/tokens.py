"""`crossnet token`: make tokens for a discovery server, and their lines for its tokens file."""

import sys
from collections.abc import Sequence

from discovery.document import BadFile
from discovery.model import Kind
from discovery.tokens import format_entry, hash_token, make_entry, make_token


def new_command(
    *,
    name: str,
    network: str | None,
    kinds: Sequence[str],
    names: Sequence[str],
    admin: bool,
    certificate: str | None = None,
) -> int:
    """Print a new token on stdout, so that it can go into a file of its own, and its entry on stderr.

    With a certificate, named by a URI or DNS name in it, there is no token: its entry alone is printed.
    """
    token = make_token() if certificate is None else None
    try:
        entry = make_entry(
            token,
            certificate=certificate,
            name=name,
            network=network,
            kinds=[Kind(kind) for kind in kinds],
            names=names,
            admin=admin,
        )
    except BadFile as error:
        for fault in error.faults:
            print(f"crossnet token: {fault}", file=sys.stderr)
        return 2
    print(f"for the tokens file of the discovery server:\n{format_entry(entry)}", file=sys.stderr)
    if token is not None:
        print(token)
    return 0


def hash_command() -> int:
    """Print the hash of the token on standard input, as a tokens file has it."""
    print(hash_token(sys.stdin.readline().strip()))
    return 0
