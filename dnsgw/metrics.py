"""What is counted: plain integers on the hot path, which a collector turns into metrics when somebody asks."""

from collections.abc import Callable, Iterable
from enum import StrEnum

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector


class Outcome(StrEnum):
    """What became of a question."""

    ANSWERED = "answered"
    NODATA = "nodata"
    NXDOMAIN = "nxdomain"
    SERVFAIL = "servfail"
    """Ours, but no relay is alive or discovery was not heard from."""

    REFUSED = "refused"
    CACHED = "cached"
    STALE = "stale"
    """Upstream gave no answer; the last one it gave was answered."""

    FORWARDED = "forwarded"
    UPSTREAM_FAILED = "upstream_failed"
    OVERLOADED = "overloaded"
    DENIED = "denied"
    LIMITED = "limited"
    """Asked by a client that had asked too much in this second."""

    MALFORMED = "malformed"
    IGNORED = "ignored"
    """Answers and fragments of messages, to which nothing is said."""

    CROWDED = "crowded"
    """Dropped: it came by UDP from a client that had more than its share waiting here."""

    UNSENT = "unsent"
    """Counted besides: the reply could not be sent."""

    ERROR = "error"
    """A fault of ours; the log has it."""


class UpstreamOutcome(StrEnum):
    """What became of one attempt to ask an upstream."""

    ANSWERED = "answered"
    FAILED_OVER = "failed_over"
    """It answered SERVFAIL or REFUSED and another one was asked."""

    RACED = "raced"
    """It took long, so that another one was asked too."""

    MISSPELLED = "misspelled"
    """An answer in another case than the question's random one: asked again over TCP."""

    WRONG_ID = "wrong_id"
    """An answer to a question that is out, with an id or at a port that it was not asked with: late, or forged."""

    WRONG_QUESTION = "wrong_question"
    """An answer with the right id to another question."""

    WRONG_COOKIE = "wrong_cookie"
    """An answer without the cookie that this upstream sends otherwise, or with a wrong one: asked again over TCP."""

    UNPROVEN = "unproven"
    """An error without the question in it: asked again over TCP."""

    DISTRUSTED = "distrusted"
    """Counted besides: asked again over TCP, since answers over UDP looked forged."""

    FLOODED = "flooded"
    """Counted besides: a socket closed that brought too much that nobody asked for."""

    ASKED_AGAIN = "asked_again"
    """It wants its cookie anew, or does not understand EDNS: asked again so."""

    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    UNWANTED = "unwanted"
    """A packet that answers nothing that was asked there: late, or forged."""


class DnsMetrics(Collector):
    """Counts of one server. Every label is there from the start."""

    def __init__(self) -> None:
        """Begin at zero."""
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
        """Give the counts as Prometheus wants them."""
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
