"""`crossnet token`: make tokens for a discovery server, and entries for its tokens file."""

import sys
from collections.abc import Sequence

from discovery.api.tokens import format_entry, hash_token, make_entry, make_token
from discovery.files.yaml_file import BadFile
from discovery.model.mesh import Kind

ROLE_KINDS: dict[str, tuple[Kind, ...]] = {
    "relay": (Kind.RELAY, Kind.TURN),
    "gateway": (Kind.ALLOCATION, Kind.GATEWAY),
    "dns": (Kind.VIP,),
    "turn": (Kind.TURN,),
    "publisher": (Kind.SERVICE,),
    "operator": (Kind.NETWORK, Kind.SERVICE, Kind.VIP),
}
"""The kinds of records that each role writes. A relay also writes those of the external TURN servers in `turn_servers`."""


def new_command(
    *,
    name: str,
    network: str | None,
    kinds: Sequence[str],
    names: Sequence[str],
    admin: bool,
    certificate: str | None = None,
    roles: Sequence[str] = (),
) -> int:
    """Print a new token on stdout, so that it can be redirected to a file, and its entry on stderr.

    With a certificate, which is identified by a URI or DNS name in it, there is no token, only an entry.
    """
    writes = list(dict.fromkeys([*map(Kind, kinds), *(kind for role in roles for kind in ROLE_KINDS[role])]))
    token = make_token() if certificate is None else None
    try:
        entry = make_entry(
            token,
            certificate=certificate,
            name=name,
            network=network,
            kinds=writes,
            names=names,
            admin=admin,
        )
    except BadFile as error:
        for fault in error.faults:
            print(f"crossnet token: {fault}", file=sys.stderr)
        return 2
    lacking = None
    if not writes and not admin:
        lacking = f"it could write nothing: give its role (--for {'|'.join(ROLE_KINDS)}), kinds of records (--kind), or --admin"
    elif Kind.SERVICE in writes and not names and not admin:
        lacking = 'it could write no service: say which names it may write (--names "*.shop.example", repeatable)'
    if lacking is not None:
        print(f"crossnet token: {lacking}", file=sys.stderr)
        return 2
    print(f"for the tokens file of the discovery server:\n{format_entry(entry)}", file=sys.stderr)
    if token is not None:
        print(token)
    return 0


def hash_command() -> int:
    """Read a token from standard input and print its hash for the tokens file."""
    print(hash_token(sys.stdin.readline().strip()))
    return 0
