"""The discovery record through which relays find our allocation."""

import hashlib
import logging

from discovery.client.contract import Discovery
from discovery.model.mesh import AllocationSpec, Kind
from discovery.model.spec import MAX_ID
from turnreg.registrar.allocation_factory import Server
from turnreg.registrar.config import RegistrarConfig

log = logging.getLogger(__name__)


def record_id(gateway: str, via: str, turn: str, replica: int = 0) -> str:
    """Return the id of an allocation record: the same at every registration, and different for every gateway and replica.

    Network ids have no dots. If the id of a gateway or TURN server has dots, or the result is too long, a hash makes it unique.
    """
    suffix = f".{replica + 1}" if replica else ""
    text = f"{gateway}.{via}.{turn}{suffix}"
    if len(text) <= MAX_ID and text.count(".") == 2 + bool(suffix):
        return text
    digest = hashlib.sha256(f"{gateway}\0{via}\0{turn}{suffix}".encode()).hexdigest()[:16]
    return f"{text[: MAX_ID - 17].rstrip('.-_')}-{digest}"


class AllocationRecord:
    """Publishes successive allocations under one record id. Withdrawing twice is harmless."""

    def __init__(self, discovery: Discovery, gateway: str, via: str, turn: str, replica: int) -> None:
        self.id = record_id(gateway, via, turn, replica)
        self._discovery = discovery
        self._gateway, self._via, self._turn = gateway, via, turn
        self._port: int | None = None

    @property
    def published(self) -> bool:
        """Whether the record exists, so that relays can see it."""
        return self._port is not None

    def publish(self, port: int, server: Server, config: RegistrarConfig) -> bool:
        """Publish this port; False if the record already has it."""
        if port == self._port:
            return False
        if not server.port_min <= port <= server.port_max:
            ports = f"{server.port_min}-{server.port_max}"
            fields = {"allocation": self.id, "port": port, "ports": ports, "detail": "relays will refuse it"}
            log.warning("relayed_port_outside", extra={"event": fields})
        spec = AllocationSpec(
            via=self._via,
            turn=self._turn,
            port=port,
            gateway=self._gateway,
            proto=list(config.proto),
            weight=config.weight,
        )
        self._discovery.publish(Kind.ALLOCATION, self.id, spec)
        self._port = port
        return True

    def withdraw(self) -> None:
        """Withdraw the record, if it is published."""
        if self._port is not None:
            self._port = None
            self._discovery.withdraw(Kind.ALLOCATION, self.id)

    def leave(self) -> None:
        """Leave the record to a successor that has already replaced it with its own."""
        self._port = None
