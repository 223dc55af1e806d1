"""Makes the table of answers for each state of discovery, with the last known relays for a while when none is alive.

Sans-IO: time comes as an argument, in seconds of any one clock.
"""

from discovery.model.mesh import Mesh
from discovery.model.names import normalise_domain
from dnsgw.config import DnsConfig
from dnsgw.mesh_zone.local_zones import LocallyServedZones
from dnsgw.mesh_zone.names_above import NamesAbove
from dnsgw.mesh_zone.zone import Table


class Tables:
    """Makes the tables of one resolver from its current configuration."""

    def __init__(self, config: DnsConfig) -> None:
        """Start with no known relay. Raises BadName for a bad domain."""
        self.reconfigure(config)
        self.holds_s = 0.0
        """How long the last table is valid, in seconds; 0: until discovery changes."""

        self._names_above = NamesAbove()
        self._relayed: Mesh | None = None
        """The last mesh in which a relay was alive."""

        self._relayless_since: float | None = None
        """Since when no relay is alive."""

    def reconfigure(self, config: DnsConfig) -> None:
        """Use another configuration. Raises BadName for a bad domain."""
        self.config = config
        self._absent = LocallyServedZones(
            config.absent, (*config.forward, normalise_domain(config.domain)), config.search
        )

    def make(self, mesh: Mesh | None, now: float) -> Table:
        """Make the table for a mesh; None: there is no state of discovery yet. Raises BadName for a bad domain."""
        config = self.config
        return Table(
            mesh,
            imports=config.imports,
            network=config.network,
            domain=config.domain,
            ttl_s=config.ttl_s,
            stale=self._stale_relays(mesh, now) if mesh is not None else None,
            vips=config.vip,
            absent=self._absent,
            names_above=self._names_above,
        )

    def _stale_relays(self, mesh: Mesh, now: float) -> Mesh | None:
        """Return an earlier mesh whose relays are answered in place of this one's, which has none; else None."""
        self.holds_s = 0.0
        if mesh.relays(self.config.network):
            self._relayed, self._relayless_since = mesh, None
            return None
        if self._relayed is None:
            return None
        if self._relayless_since is None:
            self._relayless_since = now
        self.holds_s = max(self._relayless_since + self.config.stale_relays_for_s - now, 0.0)
        return self._relayed if self.holds_s else None
