"""Transactions without sockets, for tests of what they decide."""

import itertools

from discovery.model.addresses import TargetList
from turnreg.server.allocation import Allocation, AllocationTable, Attempt, FiveTuple, Limits, Refusal
from turnreg.server.outcome import Close, GiveBack, Join, Open, Outcome, Reply
from turnreg.server.transaction import Transactions
from turnreg.stun.auth import Authenticator, long_term_key
from turnreg.stun.message import (
    FAMILY_IPV4,
    TRANSPORT_TCP,
    Attribute,
    Message,
    MessageClass,
    Method,
)

NOW = 1000.0


UNIX = 1_795_000_000.0


TUPLE = FiveTuple(("192.0.2.1", 1111), ("192.0.2.2", 3478))


OTHER = FiveTuple(("192.0.2.1", 2222), ("192.0.2.2", 3478))


RELAYED = ("10.0.0.7", 50_000)


def reply_of(outcome: Outcome) -> Reply:
    """Return the answer of any outcome that has one."""
    match outcome:
        case Reply():
            return outcome
        case Close(reply=reply):
            return reply
        case GiveBack(answer=answer) | Join(answer=answer):
            return Reply(answer=answer)
    raise AssertionError(f"no answer: {outcome}")


class Server:
    """A server without sockets, and a client that signs requests for it."""

    def __init__(
        self, *, families: tuple[int, ...] = (FAMILY_IPV4,), allowed_peers: tuple[str, ...] = (), **limits: float
    ) -> None:
        numbers = itertools.count(1)

        def draw(size: int) -> bytes:
            return next(numbers).to_bytes(size, "big")

        self.draw = draw
        self.table = AllocationTable(Limits(**limits), draw)  # type: ignore[arg-type]
        self.authenticator = Authenticator(
            realm="lab", nonce_secret=b"n" * 32, users={"u": "p", "v": "q"}, secrets=["north"]
        )
        self.transactions = Transactions(
            authenticator=self.authenticator,
            table=self.table,
            families=families,
            allowed_peers=TargetList.parse(allowed_peers),
            software="crossnet",
            draw=draw,
        )

    def request(self, method: int) -> Message:
        return Message(method, MessageClass.REQUEST, self.draw(12))

    def sign(self, message: Message, user: str = "u", password: str = "p", *, fingerprint: bool = False) -> Message:
        message = (
            message.with_text(Attribute.USERNAME, user)
            .with_text(Attribute.REALM, "lab")
            .with_text(Attribute.NONCE, self.authenticator.nonce("192.0.2.1", UNIX))
        )
        key = long_term_key(user, "lab", password)
        return Message.parse(message.pack(integrity_key=key, fingerprint=fingerprint))

    def respond(self, message: Message, *, at: FiveTuple = TUPLE, now: float = NOW) -> Outcome:
        return self.transactions.respond(at, message, now=now, unix_now=UNIX)

    def answer(self, message: Message, *, user: str = "u", password: str = "p", at: FiveTuple = TUPLE) -> Message:
        """Sign a request and return the answer, which must be signed too."""
        reply = reply_of(self.respond(self.sign(message, user, password), at=at))
        answer = Message.parse(reply.answer)
        assert answer.verify_integrity(long_term_key(user, "lab", password))
        assert answer.transaction_id == message.transaction_id
        assert (answer.error is None) is (reply.refusal is None)
        return answer

    def code(self, message: Message, *, user: str = "u", password: str = "p", at: FiveTuple = TUPLE) -> int:
        error = self.answer(message, user=user, password=password, at=at).error
        return 0 if error is None else error[0]

    def allocate_request(self, transport: int = TRANSPORT_TCP) -> Message:
        return self.request(Method.ALLOCATE).with_first_byte(Attribute.REQUESTED_TRANSPORT, transport)

    def allocate(
        self, request: Message | None = None, *, user: str = "u", password: str = "p", at: FiveTuple = TUPLE
    ) -> tuple[Allocation, Message]:
        signed = self.sign(request or self.allocate_request(), user, password)
        step = self.respond(signed, at=at)
        assert isinstance(step, Open)
        allocation, answer = self.transactions.complete_allocate(step, RELAYED, NOW)
        return allocation, Message.parse(answer)

    def permission(self, *addresses: str) -> Message:
        message = self.request(Method.CREATE_PERMISSION)
        for address in addresses:
            message = message.with_xor_address(Attribute.XOR_PEER_ADDRESS, (address, 5))
        return message

    def bind(self, connection_id: bytes) -> Message:
        return self.request(Method.CONNECTION_BIND).with_bytes(Attribute.CONNECTION_ID, connection_id)

    def attempt(self, allocation: Allocation) -> Attempt:
        allocation.permit(["10.0.0.9"], 300.0, 10, NOW)
        announced = self.table.announce(allocation, ("10.0.0.9", 40_000), NOW)
        assert not isinstance(announced, Refusal)
        return announced[0]
