"""The ages of records that were created while this server was running. Sans-IO: the clock is passed in."""

from collections.abc import Callable, Mapping, Sequence

from discovery.model.mesh import Deletion, Key
from discovery.store import Change


class RecordAges:
    """The creation time of each record. Overwriting a record does not change it; records from before the start have none."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._came_at: dict[Key, float] = {}
        self._there: set[Key] = set()

    def known(self, keys: Sequence[Key]) -> None:
        """Note the records that exist at the start."""
        self._there.update(keys)

    def apply(self, changes: Sequence[Change]) -> None:
        """Apply changes of the store."""
        for change in changes:
            if isinstance(change, Deletion):
                self._came_at.pop(change.key, None)
                self._there.discard(change.key)
            elif change.key not in self._there:
                self._there.add(change.key)
                self._came_at[change.key] = self._clock()

    def now(self) -> Mapping[Key, float]:
        """Return the age of each record in seconds."""
        now = self._clock()
        return {key: now - came_at for key, came_at in self._came_at.items()}
