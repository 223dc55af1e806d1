"""Epochs: what ties a preamble to the one process that it was made for (PROTOCOL.md, section 4).

Each gateway process draws 16 random bytes at its start and publishes them in the records of its allocations and of itself. A relay
signs them, and the gateway takes no others: a captured preamble is of no use to the process that comes after it, whatever any
clock says. A relay that has another epoch is refused before anything is delivered (`stale_epoch`), is told the right one, and
signs anew. That answer is signed as well: a TURN server in between cannot make a relay send its first bytes a second time.

Between different versions: an epoch is one more entry of a record's `proto`, which those that do not know it skip, and an ignored
TLV in the preamble. A gateway takes a preamble without the TLV, which only a relay from before epochs makes, unless told not to
(`gateway.require_epoch`); a relay that knows epochs always signs one, zeros where it does not know which, so that nothing can make
it leave it out.
"""

import base64
import hmac
from collections.abc import Iterable
from typing import Final

EPOCH_SIZE: Final = 16
UNKNOWN_EPOCH: Final = bytes(EPOCH_SIZE)
"""What a relay signs that has not heard of the gateway's epoch; no gateway has it."""

_PREFIX: Final = "epoch-"
_SUFFIX: Final = "/1"
_TEXT_LENGTH: Final = 26
_PROOF_LABEL: Final = b"crossnet stale_epoch"


def proto_of(epoch: bytes) -> str:
    """Return the entry of a record's `proto` that tells this epoch."""
    return f"{_PREFIX}{_text(epoch)}{_SUFFIX}"


def epoch_in(proto: Iterable[str]) -> bytes | None:
    """Return the epoch that a record tells, None where it tells none."""
    for entry in proto:
        if entry.startswith(_PREFIX) and entry.endswith(_SUFFIX):
            epoch = _parse(entry[len(_PREFIX) : -len(_SUFFIX)])
            if epoch is not None:
                return epoch
    return None


def stale_detail(epoch: bytes, key: bytes, once: bytes) -> str:
    """Return what a refusal says to the relay that signed another epoch: ours, proven.

    Args:
        key: the secret that the refused preamble was signed with.
        once: `Preamble.once` of that preamble, so that an answer is good for it alone.
    """
    return f"{_text(epoch)} {_proof(epoch, key, once)}"


def told_epoch(detail: str, key: bytes, once: bytes) -> bytes | None:
    """Return the epoch that such a detail tells, None where it is not proven. Arguments as for `stale_detail`."""
    text, _, proof = detail.partition(" ")
    epoch = _parse(text)
    if epoch is None or not hmac.compare_digest(proof.encode(), _proof(epoch, key, once).encode()):
        return None
    return epoch


def _proof(epoch: bytes, key: bytes, once: bytes) -> str:
    return hmac.digest(key, _PROOF_LABEL + epoch + once, "sha256").hex()


def _text(epoch: bytes) -> str:
    return base64.b32encode(epoch).decode().rstrip("=").lower()


def _parse(text: str) -> bytes | None:
    if len(text) != _TEXT_LENGTH or not text.isascii():
        return None
    try:
        return base64.b32decode(text.upper() + "======")
    except ValueError:
        return None
