"""The client's configuration."""

import dataclasses

import pytest

from discovery.client.config import DiscoveryClientConfig


def test_the_configuration_is_frozen_and_hides_the_token() -> None:
    config = DiscoveryClientConfig(urls=["https://10.0.0.1:8600"], network="a", token="crossnet-secret")
    assert "secret" not in repr(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.token = None  # type: ignore[misc]
