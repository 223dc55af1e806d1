"""The report of the lab: all hops of one request, the result of each client, the certificate that the service saw, the checks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One step of a request."""

    part: str
    address: str
    did: str
    ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check and its result."""

    what: str
    ok: bool
    detail: str = ""

    def __str__(self) -> str:
        return f"{'ok    ' if self.ok else 'FAILED'}  {self.what}" + (f": {self.detail}" if self.detail else "")


@dataclass(slots=True, kw_only=True)
class Account:
    """The report, in the order in which it is printed."""

    mode: str
    """How the networks were built, in words."""
    networks: Sequence[tuple[str, str]] = ()
    """Where each part is: network, and a description."""
    request: str = ""
    """The request whose hops are listed."""
    hops: list[Hop] = field(default_factory=list)
    got: list[tuple[str, str, str, float]] = field(default_factory=list)
    """Client, name, result, milliseconds."""
    seen: str = ""
    checks: list[Check] = field(default_factory=list)
    unproven: Sequence[str] = ()
    next: Sequence[str] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether there were checks and all have passed."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    def lines(self, every_check: bool) -> Iterator[str]:
        """Yield the report as text; with `every_check`, also the checks that have passed."""
        yield f"crossnet lab: {self.mode}"
        yield ""
        yield from _columns(self.networks, "  ")
        if self.hops:
            yield ""
            yield f"One request, hop by hop: {self.request}"
            yield from _hops(self.hops)
        if self.got:
            yield ""
            yield "What the clients got"
            yield from _columns(
                [(client, name, result, f"{ms:6.0f} ms") for client, name, result, ms in self.got], "  "
            )
        if self.seen:
            yield ""
            yield "The client certificate that the service saw"
            yield f"  {self.seen}"
        yield from _list("What this does not prove", self.unproven)
        yield from _list("What to try next", self.next)
        yield ""
        for check in self.checks:
            if every_check or not check.ok:
                yield str(check)
        good = sum(check.ok for check in self.checks)
        yield f"{'ok' if self.ok else 'FAILED'}: {good} of {len(self.checks)} checks, {self.seconds:.1f} s in all"


def _hops(hops: Sequence[Hop]) -> Iterator[str]:
    rows = [
        (f"{number} {hop.part}", hop.address, hop.did, f"{hop.ms:7.1f} ms" if hop.ms is not None else "")
        for number, hop in enumerate(hops, 1)
    ]
    yield from _columns(rows, "  ")


def _list(title: str, items: Sequence[str]) -> Iterator[str]:
    if items:
        yield ""
        yield title
        for item in items:
            yield f"  - {item}"


def _columns(rows: Sequence[Sequence[str]], indent: str) -> Iterator[str]:
    """Yield rows with aligned columns."""
    if not rows:
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
