"""The command line. Each command is implemented in a module of its own, which is imported when it is used.

Exit codes: 0 success, 1 failure, 2 an error in the configuration or the command line, 130 and 143 ended by a signal.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

from crossnet.config.file import ConfigError, effective, load, warnings
from crossnet.config.sections import DEFAULT_ADMIN, DEFAULT_DOMAIN, ROLES
from discovery.model.spec import Kind

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

FAILED = 1
USAGE = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as usage:  # argparse has printed the error or the help
        return usage.code if isinstance(usage.code, int) else USAGE
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        status = command(arguments)
        sys.stdout.flush()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except (
        BrokenPipeError
    ):  # `crossnet records list | head`: the reader has gone, and the interpreter must not flush again
        sys.stdout = None
        return FAILED
    return status


def _check(arguments: argparse.Namespace) -> int:
    status = 0
    for path in arguments.config:
        try:
            config = load(path)
        except ConfigError as error:
            print(error, file=sys.stderr)
            status = USAGE
            continue
        for warning in warnings(config):
            print(f"{path}: warning: {warning}", file=sys.stderr)
        if arguments.names:
            from crossnet.cli.rule_check import check_names

            status = max(status, check_names(config, arguments.names, arguments.source, arguments.port))
        else:
            print(effective(config), end="")
    return status


def _run(arguments: argparse.Namespace) -> int:
    from crossnet.process import run

    config = load(arguments.config)
    missing = [role for role in arguments.roles if role not in config.roles]
    if missing or not config.roles:
        wanted = f"a section {missing[0]}" if missing else f"at least one role of {', '.join(ROLES)}"
        print(f"{arguments.config}: $: expected {wanted}, got nothing", file=sys.stderr)
        return USAGE
    chosen = [role for role in config.roles if not arguments.roles or role in arguments.roles]
    return run(config, chosen, arguments.config)


def _name(arguments: argparse.Namespace) -> int:
    from crossnet.cli.names import decode_command, encode_command

    domain: str = load(arguments.config).domain if arguments.config else arguments.domain
    if arguments.direction == "encode":
        return encode_command(arguments.target, arguments.network, domain)
    return decode_command(arguments.names, domain, arguments.json)


def _status(arguments: argparse.Namespace) -> int:
    from crossnet.cli.status import status_command

    admin = load(arguments.config).admin if arguments.config else arguments.admin
    address = str(admin).removeprefix("http://").rstrip("/")
    return status_command(address, watch=arguments.watch, as_json=arguments.json)


def _records(arguments: argparse.Namespace) -> int:
    from crossnet.cli import records

    config = load(arguments.config)
    try:
        if arguments.action == "list":
            return records.list_records(config, arguments.kind, arguments.network, arguments.json)
        if arguments.action == "export":
            return records.export_records(config, arguments.network, arguments.leased)
        if arguments.action == "import":
            return records.import_records(config, arguments.file, arguments.leased)
        key = (config, arguments.kind, arguments.network, arguments.id)
        if arguments.action == "put":
            return records.put_record(*key, arguments.spec)
        return {"get": records.get_record, "delete": records.delete_record}[arguments.action](*key)
    except records.RecordsError as error:
        print(f"crossnet records: {error}", file=sys.stderr)
        return FAILED


def _token(arguments: argparse.Namespace) -> int:
    from crossnet.cli.tokens import hash_command, new_command

    if arguments.action == "hash":
        return hash_command()
    return new_command(
        name=arguments.name,
        network=arguments.network,
        kinds=arguments.kind,
        names=arguments.names,
        admin=arguments.admin,
        certificate=arguments.certificate,
        roles=arguments.roles,
    )


def _lab(arguments: argparse.Namespace) -> int:
    from crossnet.lab.run import Options, lab

    names = ("turn", "mode", "service", "check", "stay", "inside")
    return lab(Options(**{name: getattr(arguments, name) for name in names}))


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="crossnet", description="Reach mutual-TLS services in networks that accept nothing from outside."
    )
    top.add_argument("--version", action="version", version=f"crossnet {version('crossnet')}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run the roles that a file configures, in one process")
    run.add_argument("-c", "--config", type=Path, required=True, metavar="FILE")
    run.add_argument("roles", nargs="*", metavar="ROLE", type=_role, help=f"only these: {', '.join(ROLES)}")
    run.set_defaults(command=_run)

    check = commands.add_parser(
        "check",
        help="report all errors of a file, or print it with all defaults, or show which rule decides about a name",
    )
    check.add_argument("-c", "--config", type=Path, required=True, metavar="FILE", action="append")
    check.add_argument("names", nargs="*", metavar="NAME", help="show which rule of relay and gateway decides about it")
    check.add_argument(
        "--from",
        dest="source",
        action="append",
        default=[],
        metavar="CLIENT|NETWORK",
        help="the source: a client's address, and at a gateway a network",
    )
    check.add_argument("--port", type=int, metavar="PORT", help="the relay's port that the client connects to")
    check.set_defaults(command=_check)

    status = commands.add_parser("status", help="show the state of a running process")
    status.add_argument(
        "--admin", default=str(DEFAULT_ADMIN), metavar="HOST:PORT", help="its admin server (%(default)s)"
    )
    status.add_argument("-c", "--config", type=Path, metavar="FILE", help="take the admin server from this file")
    status.add_argument("--watch", action="store_true", help="repeat every second, until Ctrl-C")
    status.add_argument("--json", action="store_true", help="everything, for programs")
    status.set_defaults(command=_status)

    _add_name(commands)
    _add_records(commands)
    _add_token(commands)
    _add_lab(commands)
    return top


def _add_records(commands: Commands) -> None:
    records = commands.add_parser("records", help="read and write records of a discovery server")
    records.add_argument(
        "-c", "--config", type=Path, required=True, metavar="FILE", help="for the discovery server and the token"
    )
    actions = records.add_subparsers(dest="action", required=True, metavar="list|get|put|delete|export|import")
    listing = actions.add_parser("list", help="print records, one per line")
    listing.add_argument("--kind", choices=[*Kind])
    listing.add_argument("--network")
    listing.add_argument("--json", action="store_true", help="one JSON object per line")
    exporting = actions.add_parser("export", help="print the server's records as a mesh file")
    exporting.add_argument("--network")
    exporting.add_argument("--leased", action="store_true", help="also records with a lease, of our own network")
    importing = actions.add_parser("import", help="write every record of a mesh file to the server")
    importing.add_argument("file", type=Path, metavar="FILE")
    importing.add_argument(
        "--leased",
        action="store_true",
        help="also records that running processes write; they stay until they are deleted",
    )
    for action, words in (("get", "print"), ("put", "write"), ("delete", "delete")):
        one = actions.add_parser(action, help=f"{words} one record")
        one.add_argument("kind", choices=[*Kind], metavar="KIND", help=", ".join(Kind))
        one.add_argument("id", metavar="ID")
        if action == "put":
            one.add_argument("spec", metavar="SPEC", help="JSON, or - for standard input")
        one.add_argument("--network", help="by default the configuration's own")
    records.set_defaults(command=_records)


def _add_token(commands: Commands) -> None:
    token = commands.add_parser("token", help="make tokens for a discovery server")
    actions = token.add_subparsers(dest="action", required=True, metavar="new|hash")
    new = actions.add_parser("new", help="print a new token, and on stderr its line for the tokens file")
    new.add_argument("--name", default="", help="for the server's log")
    new.add_argument("--network", help="the network whose records it may write")
    new.add_argument(
        "--for",
        dest="roles",
        action="append",
        default=[],
        choices=("relay", "gateway", "dns", "turn", "publisher", "operator"),
        help="the role that uses it: it may write the kinds of records that this role needs; repeatable",
    )
    new.add_argument(
        "--kind", action="append", default=[], choices=[*Kind], help="kind of records that it may write; repeatable"
    )
    new.add_argument(
        "--names", action="append", default=[], metavar="GLOB", help="services that it may write; repeatable"
    )
    new.add_argument("--admin", action="store_true", help="may do everything")
    new.add_argument(
        "--certificate",
        metavar="NAME",
        help="instead of a token, a client certificate with this URI (SPIFFE id) or DNS name",
    )
    actions.add_parser("hash", help="read a token from standard input and print its hash")
    token.set_defaults(command=_token)


def _add_lab(commands: Commands) -> None:
    lab = commands.add_parser("lab", help="build two isolated networks on this machine, with real clients in one")
    lab.add_argument(
        "--turn", choices=["embedded", "coturn"], default="embedded", help="which TURN server (%(default)s)"
    )
    lab.add_argument(
        "--mode",
        choices=["auto", "netns", "loopback"],
        default="auto",
        help="network namespaces, or loopback addresses; auto uses what the kernel allows",
    )
    lab.add_argument(
        "--service", choices=["auto", "nginx", "openssl", "python"], default="auto", help="the service in network b"
    )
    lab.add_argument(
        "--check", action="store_true", help="list all checks; the exit code is 1 on any failure, with or without this"
    )
    lab.add_argument("--stay", action="store_true", help="keep it running until Ctrl-C, and print how to look around")
    lab.add_argument("--inside", help=argparse.SUPPRESS)
    lab.set_defaults(command=_lab)


def _role(text: str) -> str:
    if text not in ROLES:
        raise argparse.ArgumentTypeError(f"expected {', '.join(ROLES)}, got {text!r}")
    return text


def _add_name(commands: Commands) -> None:
    name = commands.add_parser("name", help="make or read names of the mesh domain")
    directions = name.add_subparsers(dest="direction", required=True, metavar="encode|decode")
    encode = directions.add_parser("encode", help="print the names of a target, compact form first")
    encode.add_argument("target", metavar="TARGET", help="10.1.0.5:8443, [fd00::5]:8443 or orders.shop:8443")
    encode.add_argument("-n", "--network", required=True, help="the network that the target is in")
    decode = directions.add_parser("decode", help="print what names mean")
    decode.add_argument("names", metavar="NAME", nargs="+")
    decode.add_argument("--json", action="store_true", help="one JSON object per name")
    for direction in (encode, decode):
        direction.add_argument("-d", "--domain", default=DEFAULT_DOMAIN, help="the mesh domain (%(default)s)")
        direction.add_argument("-c", "--config", type=Path, metavar="FILE", help="take the mesh domain from this file")
    name.set_defaults(command=_name)
