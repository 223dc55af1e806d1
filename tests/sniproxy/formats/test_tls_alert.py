"""Alert records, byte for byte, and read by a real TLS client."""

import ssl

import pytest

from sniproxy.formats.tls_alert import AlertDescription, alert_record

SPOKEN = {
    AlertDescription.ACCESS_DENIED: "access denied",
    AlertDescription.DECODE_ERROR: "decode error",
    AlertDescription.INTERNAL_ERROR: "internal error",
    AlertDescription.UNRECOGNIZED_NAME: "unrecognized name",
}


def test_numbers_and_bytes() -> None:
    assert {description: int(description) for description in AlertDescription} == {
        AlertDescription.ACCESS_DENIED: 49,
        AlertDescription.DECODE_ERROR: 50,
        AlertDescription.INTERNAL_ERROR: 80,
        AlertDescription.UNRECOGNIZED_NAME: 112,
    }
    assert alert_record(AlertDescription.UNRECOGNIZED_NAME) == bytes.fromhex("15030300020270")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("description", AlertDescription)
def test_openssl_understands(description: AlertDescription, version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context()
    context.minimum_version = context.maximum_version = version
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="a.example")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    incoming.write(alert_record(description))
    with pytest.raises(ssl.SSLError, match="(?i)" + SPOKEN[description].replace(" ", "[ _]")):
        client.do_handshake()
