"""Requests that servers refuse: remembered until they succeed, and logged once."""

import logging

from yarl import URL

from discovery.client.servers import RequestRefused

log = logging.getLogger(__name__)


class Refusals:
    """Requests that a server refuses for a reason that an operator has to fix, such as an unknown token."""

    __slots__ = ("_words",)

    def __init__(self) -> None:
        self._words: dict[str, str] = {}  # by the request

    def note(self, what: str, url: URL, error: RequestRefused) -> None:
        """Remember a refusal, and log it if it is new. Rate limits end by themselves and are ignored."""
        if error.code == "rate_limited":
            return
        words = f"discovery at {url} refuses {what}: {error}"
        if self._words.get(what) != words:
            event = {"url": str(url), "asked": what, "status": error.status, "why": str(error)}
            log.error("discovery_refused", extra={"event": event})
        self._words[what] = words

    def clear(self, what: str) -> None:
        """Forget a refusal: the same request has succeeded."""
        self._words.pop(what, None)

    def words(self) -> list[str]:
        """Return a sentence for each refused request, without duplicates."""
        return list(dict.fromkeys(self._words.values()))

    def __bool__(self) -> bool:
        return bool(self._words)
