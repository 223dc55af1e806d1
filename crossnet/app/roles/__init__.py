"""The roles, one module each, in the order in which they start: each depends only on those before it."""

from crossnet.app.role import Role
from crossnet.app.roles.discovery_server import DiscoveryServerRole
from crossnet.app.roles.dns import DnsRole
from crossnet.app.roles.gateway import GatewayRole
from crossnet.app.roles.publisher import PublisherRole
from crossnet.app.roles.relay import RelayRole
from crossnet.app.roles.turn import TurnRole
from crossnet.app.roles.turn_servers import TurnServersRole

ROLES: tuple[type[Role], ...] = (
    DiscoveryServerRole,
    TurnRole,
    TurnServersRole,
    DnsRole,
    RelayRole,
    GatewayRole,
    PublisherRole,
)
