"""Epochs tie a preamble to the one gateway process that it was made for (PROTOCOL.md, section 4).

Each gateway process draws 16 random bytes at its start, its epoch, and publishes it in its own record and in those of its
allocations. A relay signs it, and the gateway accepts no other: a captured preamble is useless against a later process, whatever
the clocks say. A relay that signed another epoch is refused before anything is delivered (`stale_epoch`). The refusal contains
the right one, and the relay signs again. That answer is signed too, so a TURN server in between cannot make a relay send its
first bytes twice.

Compatibility: an epoch is one more entry in a record's `proto`, which older versions skip, and a TLV in the preamble, which they
ignore. A gateway accepts a preamble without this TLV, which only a relay from before epochs makes, unless `gateway.require_epoch`
is set. A relay that knows epochs always signs one, zeros if it does not know the gateway's, so nothing can make it omit the TLV.
"""

import base64
import hmac
from collections.abc import Iterable
from typing import Final

EPOCH_SIZE: Final = 16
UNKNOWN_EPOCH: Final = bytes(EPOCH_SIZE)
"""What a relay signs if it does not know the gateway's epoch. No gateway has this epoch."""

_PREFIX: Final = "epoch-"
_SUFFIX: Final = "/1"
_TEXT_LENGTH: Final = 26
_PROOF_LABEL: Final = b"crossnet stale_epoch"


def proto_of(epoch: bytes) -> str:
    """Return the entry for a record's `proto` that contains this epoch."""
    return f"{_PREFIX}{_text(epoch)}{_SUFFIX}"


def epoch_in(proto: Iterable[str]) -> bytes | None:
    """Return the epoch in a record's `proto`, None if there is none."""
    for entry in proto:
        if entry.startswith(_PREFIX) and entry.endswith(_SUFFIX):
            epoch = _parse(entry[len(_PREFIX) : -len(_SUFFIX)])
            if epoch is not None:
                return epoch
    return None


def stale_detail(epoch: bytes, key: bytes, once: bytes) -> str:
    """Return the detail of a refusal for a relay that signed another epoch: our epoch, and a proof of it.

    Args:
        epoch: our epoch.
        key: the secret that signed the refused preamble.
        once: `Preamble.once` of that preamble, so that the answer is valid for it alone.
    """
    return f"{_text(epoch)} {_proof(epoch, key, once)}"


def told_epoch(detail: str, key: bytes, once: bytes) -> bytes | None:
    """Return the epoch in such a detail, None if the proof is wrong. Arguments as for `stale_detail`."""
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
