"""The sections of the configuration file and the rules over their keys.

Each section is a dataclass whose fields are the section's keys, with the defaults written out.
"""

from crossnet.config.sections.discovery import DiscoveryServerSection
from crossnet.config.sections.dns import DnsSection
from crossnet.config.sections.gateway import GatewaySection, TurnAccessSection
from crossnet.config.sections.policy import policy
from crossnet.config.sections.publisher import PublisherSection
from crossnet.config.sections.relay import RelaySection
from crossnet.config.sections.root import DEFAULT_ADMIN, DEFAULT_DOMAIN, ROLES, Config, search_domains
from crossnet.config.sections.turn import TurnSection

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
