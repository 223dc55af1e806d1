"""The permissions of an allocation: requested when the set of addresses changes, and again before they expire."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Protocol

from discovery.model.addresses import BadAddress, parse_address
from turnreg.client.control_connection import TurnError, TurnReason
from turnreg.stun.message import FAMILY_IPV4, FAMILY_IPV6, Attribute, Message, Method

log = logging.getLogger(__name__)

PERMISSIONS_PER_REQUEST = 32
"""Several XOR-PEER-ADDRESS fit one request (RFC 8656, section 10.1); 32 IPv6 ones are 768 bytes."""

MAX_PERMISSIONS = 1000
"""coturn accepts 1024 per allocation since 4.17; a network with more relays can run several TURN servers."""

FATAL = frozenset(
    {
        TurnReason.CONNECTION_LOST,
        TurnReason.TIMEOUT,
        TurnReason.MALFORMED,
        TurnReason.BAD_ANSWER,
        TurnReason.UNAUTHORIZED,
        TurnReason.WRONG_CREDENTIALS,
        TurnReason.STALE_NONCE,
        TurnReason.MISMATCH,
    }
)
"""Errors of a permission request that mean that the allocation is lost. All others concern the addresses."""


class Ask(Protocol):
    """Send a request with the attributes that `fill` adds; return its success answer or raise TurnError."""

    def __call__(self, method: Method, fill: Callable[[Message], Message]) -> Awaitable[Message]: ...


class Permissions:
    """The permissions of one allocation. Set `family` once it is known; addresses of the other family are not requested."""

    def __init__(self, *, record: str, ask: Ask, refresh_s: float, refused_retry_s: float) -> None:
        self.family = FAMILY_IPV4
        self.refused: dict[str, str] = {}
        """Addresses without a permission, and the reason."""
        self._record = record
        self._ask = ask
        self._refresh_s, self._refused_retry_s = refresh_s, refused_retry_s
        self._wanted: frozenset[str] = frozenset()
        self._due: dict[str, float] = {}  # address to the time of its next request; absent: at once
        self._changed = asyncio.Event()

    @property
    def granted(self) -> frozenset[str]:
        """The addresses that have a permission."""
        return frozenset(self._due.keys() - self.refused.keys())

    def wants(self, address: str) -> bool:
        """Tell whether this address may connect. The server may still have permissions for addresses that may not."""
        return address in self._wanted

    def want(self, addresses: frozenset[str]) -> None:
        """Set the addresses that may connect. Invalid addresses, and those over the maximum, are left out and logged."""
        wanted = set()
        for text in sorted(addresses):
            try:
                address = parse_address(text)
            except BadAddress as exc:
                self._leave_out(text, str(exc))
                continue
            if address.version == 6 and address.ipv4_mapped is not None:
                # In coturn before 4.9 such an address bypasses the list of denied peers (CVE-2026-27624).
                self._leave_out(text, "it is IPv4-mapped")
                continue
            wanted.add(str(address))
        if len(wanted) > MAX_PERMISSIONS:
            self._leave_out("", f"{len(wanted)} addresses, of which {MAX_PERMISSIONS} are admitted")
            wanted = set(sorted(wanted)[:MAX_PERMISSIONS])
        self._wanted = frozenset(wanted)
        for gone in self._due.keys() - wanted:
            del self._due[gone]
        for gone in self.refused.keys() - wanted:
            del self.refused[gone]
        self._changed.set()

    def _leave_out(self, address: str, why: str) -> None:
        event = {"allocation": self._record, "address": address, "detail": why}
        log.warning("permission_left_out", extra={"event": event})

    async def keep(self) -> None:
        """Request changes at once, and refresh all permissions in time. Raises TurnError when the server is lost."""
        loop = asyncio.get_running_loop()
        while True:
            next_due = min(self._due.values(), default=math.inf)
            try:
                async with asyncio.timeout_at(None if next_due == math.inf else max(next_due, loop.time())):
                    await self._changed.wait()
            except TimeoutError:
                pass  # no change, but time to refresh
            await self.ask()

    async def ask(self) -> None:
        """Request every permission that is due now or soon. Raises TurnError when the server is lost."""
        self._changed.clear()
        for address in self._wanted - self._due.keys():
            if (FAMILY_IPV6 if ":" in address else FAMILY_IPV4) != self.family:
                self._refuse(address, "its family is not that of the relayed address", math.inf)
        now = asyncio.get_running_loop().time()
        soon = now + self._refresh_s / 10  # a few requests together instead of many single ones
        due = sorted(a for a in self._wanted if self._due.get(a, now) <= (now if a in self.refused else soon))
        good = [address for address in due if address not in self.refused]
        bad = [
            address for address in due if address in self.refused
        ]  # each alone: one bad address fails a whole request
        for at in range(0, len(good), PERMISSIONS_PER_REQUEST):
            await self._ask_for(good[at : at + PERMISSIONS_PER_REQUEST])
        for address in bad:
            await self._ask_for([address])

    async def _ask_for(self, batch: list[str]) -> None:
        def fill(message: Message) -> Message:
            for address in batch:
                # The port does not matter: a permission is for an address (RFC 8656, section 9).
                message = message.with_xor_address(Attribute.XOR_PEER_ADDRESS, (address, 0))
            return message

        try:
            await self._ask(Method.CREATE_PERMISSION, fill)
        except TurnError as exc:
            if exc.reason in FATAL:
                raise
            if len(batch) == 1:
                self._refuse(batch[0], exc.detail, self._refused_retry_s)
                return
            # One bad address fails the whole request (RFC 8656, section 10.2): bisect to find it.
            middle = len(batch) // 2
            await self._ask_for(batch[:middle])
            await self._ask_for(batch[middle:])
            return
        due = asyncio.get_running_loop().time() + self._refresh_s
        for address in self._wanted.intersection(batch):  # some may have been removed meanwhile
            self._due[address] = due
            self.refused.pop(address, None)

    def _refuse(self, address: str, why: str, retry_s: float) -> None:
        if address not in self._wanted:
            return
        if address not in self.refused:
            fields = {"allocation": self._record, "address": address, "detail": why}
            log.warning("permission_refused", extra={"event": fields})
        self.refused[address] = why
        self._due[address] = asyncio.get_running_loop().time() + retry_s
