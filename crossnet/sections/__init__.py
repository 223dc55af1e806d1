"""The sections of the configuration file and the rules over their keys.

Each section is a dataclass whose fields are the section's keys, with the defaults written out.
"""

from crossnet.sections.discovery import DiscoveryServerSection
from crossnet.sections.dns import DnsSection
from crossnet.sections.gateway import GatewaySection, TurnAccessSection
from crossnet.sections.policy import policy
from crossnet.sections.publisher import PublisherSection
from crossnet.sections.relay import RelaySection
from crossnet.sections.turn import TurnSection
from crossnet.sections.whole import DEFAULT_ADMIN, DEFAULT_DOMAIN, ROLES, Config, search_domains

__all__ = [
    "DEFAULT_ADMIN",
    "DEFAULT_DOMAIN",
    "ROLES",
    "Config",
    "DiscoveryServerSection",
    "DnsSection",
    "GatewaySection",
    "PublisherSection",
    "RelaySection",
    "TurnAccessSection",
    "TurnSection",
    "policy",
    "search_domains",
]
