"""`crossnet lab`: choose a mode, build the networks, run the checks, print the report, and clean up however it ends."""

import contextlib
import os
import secrets
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from crossnet.lab import enter
from crossnet.lab.account import Account
from crossnet.lab.program import ProgramError
from crossnet.lab.scene import Scene
from crossnet.lab.stage import Stage
from crossnet.lab.topology import Loopback, Namespaces, Topology, TopologyError

MODES = ("auto", "netns", "loopback")
TURN_SERVERS = ("embedded", "coturn")
SERVICES = ("auto", "nginx", "openssl", "python")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
FAILED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of the command line."""

    turn: str = "embedded"
    mode: str = "auto"
    service: str = "auto"
    check: bool = False
    stay: bool = False
    inside: str | None = None
    """Set for the process that is already in its own namespaces: as which user, in words."""

    def arguments(self) -> list[str]:
        """Return the command line for that process."""
        flags = [flag for flag, given in (("--check", self.check), ("--stay", self.stay)) if given]
        return ["lab", "--turn", self.turn, "--service", self.service, *flags]


class Ended(BaseException):
    """A signal asks us to stop. Not an Exception, so that no handler of errors catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def lab(options: Options) -> int:
    """Run the lab and return its exit code."""
    # On Debian, ip, nft and nginx are in directories that an ordinary user's PATH does not contain.
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:{SBIN}"
    if options.inside is not None:
        enter.end_with_parent()
        return _perform(options, f"two network namespaces on this machine, made {options.inside}")
    reason = "asked for by --mode loopback"
    if options.mode != "loopback":
        try:
            command, words = enter.entrance()
        except OSError as error:
            reason = str(error)
        else:
            status = enter.run_within(command, [*options.arguments(), "--inside", words])
            if status != enter.IMPOSSIBLE:
                return status
            reason = "they could not be built"
        if options.mode == "netns":
            print(f"crossnet lab: no network namespaces: {reason}", file=sys.stderr)
            return FAILED
    return _perform(options, f"loopback addresses of this machine, without network namespaces ({reason})")


def _perform(options: Options, mode: str) -> int:
    with _signals_raise():
        try:
            with tempfile.TemporaryDirectory(prefix="crossnet-lab-") as name:
                folder = Path(name)
                topology: Topology = Loopback() if options.inside is None else Namespaces(folder, secrets.token_hex(3))
                return _play(options, topology, folder, mode)
        except TopologyError as error:
            print(f"crossnet lab: {error}", file=sys.stderr)
            return enter.IMPOSSIBLE if options.inside is not None else FAILED
        except ProgramError as error:
            print(f"crossnet lab: {error}", file=sys.stderr)
            return FAILED
        except Ended as ended:
            return 128 + ended.number


def _play(options: Options, topology: Topology, folder: Path, mode: str) -> int:
    started = time.monotonic()
    topology.build()
    stage = Stage(topology, folder, turn=options.turn, wanted_service=options.service)
    account = Account(mode=mode)
    with contextlib.ExitStack() as undo:
        undo.callback(stage.clear)
        undo.callback(_ignore_signals)  # the cleanup takes a bounded time and must not be interrupted
        stage.stand()
        scene = Scene(stage, account)
        scene.play()
        account.next = _next(options, stage, scene)
        account.seconds = time.monotonic() - started
        print("\n".join(account.lines(every_check=options.check)), flush=True)
        if options.stay:
            _stay()
    return 0 if account.ok else FAILED


def _next(options: Options, stage: Stage, scene: Scene) -> list[str]:
    if options.stay:
        lines = []
        if options.inside is not None:
            user = "" if options.inside == "as root" else "--user --preserve-credentials "
            for network, words in (("a", "be a client in network a"), ("b", "be a host in network b")):
                pid = stage.hold("a" if network == "a" else "b")
                lines.append(f"{words}: nsenter -t {pid} {user}--net --mount bash")
        return [
            *lines,
            f"there, or here if the networks are loopback addresses: {scene.command_line('curl')}",
            f"read the configuration and the logs of every part: ls {shlex.quote(str(stage.folder))}",
            f"watch: crossnet status --watch --admin {':'.join(map(str, stage.plan.admin('relay')))}   (in network a)",
            "break something: end one of the processes and see which requests still work",
            "Ctrl-C ends the lab and leaves nothing behind",
        ]
    other = "coturn" if options.turn == "embedded" else "embedded"
    return [
        'keep it running and look around: make lab LAB="--stay"',
        f'the same with the other TURN server: make lab LAB="--turn {other}"',
        "names of targets: crossnet name encode 10.1.0.5:8443 --network b",
    ]


def _stay() -> None:
    """Wait for a signal. Ctrl-C is the normal end here, not a failure."""
    try:
        while True:
            signal.pause()
    except Ended as ended:
        if ended.number != signal.SIGINT:
            raise


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        del frame
        raise Ended(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
