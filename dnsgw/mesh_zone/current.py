"""The table of each state of discovery; and of the relays known last, for a while, when none is alive.

Sans-IO: time comes as an argument, in seconds of any one clock.
"""

from discovery.model.mesh import Mesh
from discovery.model.names import normalise_domain
from dnsgw.config import DnsConfig
from dnsgw.mesh_zone.local_zones import LocallyServedZones
from dnsgw.mesh_zone.zone import Table


class Tables:
    """Makes the tables of one resolver, by the configuration that it was given last."""

    def __init__(self, config: DnsConfig) -> None:
        """Begin without a relay ever seen. Raises BadName for a bad domain."""
        self.reconfigure(config)
        self.holds_s = 0.0
        """How long the last table holds before it is to be made anew; 0: until there is news."""

        self._relayed: Mesh | None = None
        """The last mesh in which a relay was alive, and since when that is not so."""
        self._relayless_since: float | None = None

    def reconfigure(self, config: DnsConfig) -> None:
        """Go by this from now on. Raises BadName for a bad domain."""
        self.config = config
        self._absent = LocallyServedZones(
            config.absent, (*config.forward, normalise_domain(config.domain)), config.search
        )

    def make(self, mesh: Mesh | None, now: float) -> Table:
        """Make the table of a mesh; None: discovery was not heard from. Raises BadName for a bad domain."""
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
        )

    def _stale_relays(self, mesh: Mesh, now: float) -> Mesh | None:
        """The mesh whose relays are answered if this one has none."""
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
