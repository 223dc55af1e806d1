"""For how long records have been there, as far as this server saw them come. Sans-IO: time comes from a clock given."""

from collections.abc import Callable, Mapping, Sequence

from discovery.model.mesh import Deletion, Key
from discovery.store import Change


class RecordAges:
    """When each record came. One that is written again keeps its time; one that was there before us has none."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin with no record."""
        self._clock = clock
        self._came_at: dict[Key, float] = {}
        self._there: set[Key] = set()

    def known(self, keys: Sequence[Key]) -> None:
        """Take note of what is there at the start."""
        self._there.update(keys)

    def take(self, changes: Sequence[Change]) -> None:
        """Take note of changes."""
        for change in changes:
            if isinstance(change, Deletion):
                self._came_at.pop(change.key, None)
                self._there.discard(change.key)
            elif change.key not in self._there:
                self._there.add(change.key)
                self._came_at[change.key] = self._clock()

    def now(self) -> Mapping[Key, float]:
        """Give the age of each record in seconds."""
        now = self._clock()
        return {key: now - came_at for key, came_at in self._came_at.items()}
