"""A bounded cache of recently used entries. Sans-IO."""

from typing import Generic, TypeVar

KeptT = TypeVar("KeptT")


class TwoGenerationCache(Generic[KeptT]):
    """A bounded dict of recently used entries in two generations. When the young one is full, the old one is dropped."""

    __slots__ = ("_limit", "_old", "young")

    def __init__(self, limit: int) -> None:
        """Keep at least the `limit` most recently used entries, and at most twice as many."""
        self._limit = limit
        self._old: dict[bytes, KeptT] = {}
        self.young: dict[bytes, KeptT] = {}

    def get(self, key: bytes) -> KeptT | None:
        """Return an entry and mark it as used, or None."""
        kept = self.young.get(key)
        if kept is None:
            kept = self._old.get(key)
            if kept is not None:
                self[key] = kept
        return kept

    def __setitem__(self, key: bytes, kept: KeptT) -> None:
        if len(self.young) >= self._limit:
            self._old, self.young = self.young, {}
        self.young[key] = kept

    def __len__(self) -> int:
        return len(self.young) + len(self._old)
