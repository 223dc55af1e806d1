"""Names inside messages."""

import pytest

from dnsgw.message.names import Malformed, name_at


@pytest.mark.parametrize(
    "data",
    [
        b"\xc0\x0c",
        b"\1a\xc0\xff",
        b"\x40a\0",
        b"\1",
        b"\1a",
        b"\xc0",
        b"".join(b"\x3f" + b"a" * 63 for _ in range(4)) + b"\0",
    ],
    ids=["itself", "forwards", "type 01", "cut", "no end", "half a pointer", "too long"],
)
def test_bad_names(data: bytes) -> None:
    with pytest.raises(Malformed):
        name_at(b"\0" * 12 + data, 12)


def test_a_name_must_end_where_its_record_does() -> None:
    with pytest.raises(Malformed):
        name_at(b"\0" * 12 + b"\1a\1b\0", 12, 15)
