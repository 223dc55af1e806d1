"""Metrics: plain integers on the hot path, which a collector turns into Prometheus metrics on each scrape."""

from collections.abc import Callable, Iterable
from enum import StrEnum

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector


class Outcome(StrEnum):
    """How a question was answered."""

    ANSWERED = "answered"
    NODATA = "nodata"
    NXDOMAIN = "nxdomain"
    SERVFAIL = "servfail"
    """A name of ours, but no relay is alive or there is no state of discovery yet."""

    REFUSED = "refused"
    CACHED = "cached"
    STALE = "stale"
    """Upstream gave no answer, so the last one from the cache was used."""

    FORWARDED = "forwarded"
    UPSTREAM_FAILED = "upstream_failed"
    OVERLOADED = "overloaded"
    DENIED = "denied"
    LIMITED = "limited"
    """Above the rate limit of its client."""

    MALFORMED = "malformed"
    IGNORED = "ignored"
    """Not a question (a response, or shorter than a header), so not answered."""

    CROWDED = "crowded"
    """Dropped: it came by UDP while its client, or all together, had too many packets waiting."""

    UNSENT = "unsent"
    """The reply could not be sent. Counted in addition to the outcome."""

    ERROR = "error"
    """An error in this program; it is in the log."""


class UpstreamOutcome(StrEnum):
    """The result of one attempt to ask an upstream."""

    ANSWERED = "answered"
    FAILED_OVER = "failed_over"
    """It answered SERVFAIL or REFUSED, and another upstream was asked."""

    RACED = "raced"
    """It was slow, so another upstream was asked as well."""

    MISSPELLED = "misspelled"
    """The answer's question had another case than ours: asked again over TCP."""

    WRONG_ID = "wrong_id"
    """An answer to an outstanding question, but with a wrong id or at a wrong port: late, or forged."""

    WRONG_QUESTION = "wrong_question"
    """An answer with the right id to another question."""

    WRONG_COOKIE = "wrong_cookie"
    """The answer lacks the cookie that this upstream otherwise sends, or has a wrong one: asked again over TCP."""

    UNPROVEN = "unproven"
    """An error response without a question section: asked again over TCP."""

    DISTRUSTED = "distrusted"
    """Asked again over TCP because answers over UDP looked forged. Counted in addition to the result."""

    FLOODED = "flooded"
    """A socket was closed because it received too many unsolicited packets. Counted in addition to the result."""

    ASKED_AGAIN = "asked_again"
    """It wants a fresh cookie, or does not understand EDNS: asked again accordingly."""

    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    UNWANTED = "unwanted"
    """A packet that answers no outstanding question of its socket: late, or forged."""


class DnsMetrics(Collector):
    """Counters of one server. Every label exists from the start."""

    def __init__(self) -> None:
        """Start at zero. The gauges are functions that the parts of the server set."""
        self.queries = dict.fromkeys(Outcome, 0)
        self.upstream = dict.fromkeys(UpstreamOutcome, 0)
        self.coalesced = 0
        self.prefetched = 0
        self.cache_evicted: Callable[[], int] = int
        self.cache_entries: Callable[[], int] = int
        self.cache_bytes: Callable[[], int] = int
        self.in_flight: Callable[[], int] = int
        self.tcp_connections: Callable[[], int] = int
        self.upstreams: Callable[[], list[dict[str, object]]] = list

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics for Prometheus."""
        queries = CounterMetricFamily("crossnet_dns_queries", "Questions by what became of them.", labels=["outcome"])
        for outcome, count in self.queries.items():
            queries.add_metric([outcome.value], count)
        yield queries
        upstream = CounterMetricFamily(
            "crossnet_dns_upstream_attempts", "Attempts to ask an upstream by what became of them.", labels=["outcome"]
        )
        for result, count in self.upstream.items():
            upstream.add_metric([result.value], count)
        yield upstream
        yield CounterMetricFamily(
            "crossnet_dns_coalesced", "Questions that waited for the answer to the same question.", value=self.coalesced
        )
        yield CounterMetricFamily(
            "crossnet_dns_prefetched", "Answers asked for anew before they ended.", value=self.prefetched
        )
        yield CounterMetricFamily(
            "crossnet_dns_cache_evicted", "Answers forgotten for want of room.", value=self.cache_evicted()
        )
        yield GaugeMetricFamily("crossnet_dns_cache_entries", "Answers that are kept.", value=self.cache_entries())
        yield GaugeMetricFamily("crossnet_dns_cache_bytes", "Memory that they take.", value=self.cache_bytes())
        yield GaugeMetricFamily(
            "crossnet_dns_in_flight", "Questions that wait for an upstream.", value=self.in_flight()
        )
        yield GaugeMetricFamily(
            "crossnet_dns_tcp_connections", "Clients connected over TCP.", value=self.tcp_connections()
        )
        case = GaugeMetricFamily(
            "crossnet_dns_upstream_random_case", "1: an upstream is asked in random case.", labels=["upstream"]
        )
        cookies = GaugeMetricFamily("crossnet_dns_upstream_cookies", "1: an upstream has cookies.", labels=["upstream"])
        known = {str(each["upstream"]): each for each in self.upstreams()}
        for name, each in known.items():
            case.add_metric([name], each["random_case"] == "on")
            cookies.add_metric([name], bool(each["cookies"]))
        yield case
        yield cookies
