"""The command line. Each command's work is in a module of its own, imported when the command is given.

Exit codes: 0 done, 1 failed, 2 the configuration or the command line is wrong, 130 and 143 ended by a signal.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from crossnet.config import ConfigError, effective, load, warnings
from crossnet.sections import DEFAULT_DOMAIN, ROLES

FAILED = 1
USAGE = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as usage:  # argparse has said what is wrong, or has shown help
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
    except BrokenPipeError:  # `crossnet records list | head`: nobody reads on, and the interpreter must not try again
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
        print(effective(config), end="")
    return status


def _run(arguments: argparse.Namespace) -> int:
    from crossnet.app import run

    config = load(arguments.config)
    missing = [role for role in arguments.roles if role not in config.roles]
    if missing or not config.roles:
        wanted = f"a section {missing[0]}" if missing else f"at least one role of {', '.join(ROLES)}"
        print(f"{arguments.config}: $: expected {wanted}, got nothing", file=sys.stderr)
        return USAGE
    return run(config, [role for role in config.roles if not arguments.roles or role in arguments.roles])


def _name(arguments: argparse.Namespace) -> int:
    from crossnet.names import decode_command, encode_command

    domain: str = load(arguments.config).domain if arguments.config else arguments.domain
    if arguments.direction == "encode":
        return encode_command(arguments.target, arguments.network, domain)
    return decode_command(arguments.names, domain, arguments.json)


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

    check = commands.add_parser("check", help="tell every error of a file, or print what it amounts to")
    check.add_argument("-c", "--config", type=Path, required=True, metavar="FILE", action="append")
    check.set_defaults(command=_check)

    _add_name(commands)
    return top


def _role(text: str) -> str:
    if text not in ROLES:
        raise argparse.ArgumentTypeError(f"expected {', '.join(ROLES)}, got {text!r}")
    return text


def _add_name(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    name = commands.add_parser("name", help="make or read names of the mesh domain")
    directions = name.add_subparsers(dest="direction", required=True, metavar="encode|decode")
    encode = directions.add_parser("encode", help="print the names of a target, compact form first")
    encode.add_argument("target", metavar="TARGET", help="10.1.0.5:8443, [fd00::5]:8443 or orders.shop:8443")
    encode.add_argument("-n", "--network", required=True, help="the network that the target is in")
    decode = directions.add_parser("decode", help="print what names mean")
    decode.add_argument("names", metavar="NAME", nargs="+")
    decode.add_argument("--json", action="store_true", help="one JSON object a name")
    for direction in (encode, decode):
        direction.add_argument("-d", "--domain", default=DEFAULT_DOMAIN, help="the mesh domain (%(default)s)")
        direction.add_argument("-c", "--config", type=Path, metavar="FILE", help="take the mesh domain from this file")
    name.set_defaults(command=_name)
