"""Names: encoding and decoding of every form, and BadName for anything else."""

import string
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from discovery.model.names import (
    AddressTarget,
    BadName,
    Form,
    NameReason,
    PlainName,
    ServiceTarget,
    decode,
    encode,
    is_service_name,
    is_under,
    normalise,
)

D = "svc.mesh.internal"
INSIDE = string.ascii_lowercase + string.digits + "-"

labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
ports = st.integers(1, 65535)
addresses = st.one_of(
    st.ip_addresses(v=4),
    st.ip_addresses(v=6),
    st.integers(0, 0xFFFF).map(IPv6Address),
    st.integers(1, 0xFFFF).map(lambda n: IPv6Address(n << 112)),
).filter(lambda a: not isinstance(a, IPv6Address) or a.ipv4_mapped is None)
services = st.lists(labels, min_size=2, max_size=5).map(".".join)
targets = st.one_of(
    st.builds(AddressTarget, labels, addresses, ports),
    st.builds(ServiceTarget, labels, services, ports),
    st.builds(PlainName, services),
)
domains = st.lists(labels, min_size=1, max_size=4).map(".".join)


@pytest.mark.parametrize(
    ("name", "target", "form"),
    [
        ("_8443._10-1-0-5._b", AddressTarget("b", IPv4Address("10.1.0.5"), 8443), Form.MANGLED),
        ("_8443._fd00--5._b", AddressTarget("b", IPv6Address("fd00::5"), 8443), Form.MANGLED),
        ("_1._--1._b", AddressTarget("b", IPv6Address("::1"), 1), Form.MANGLED),
        ("_1._--._b", AddressTarget("b", IPv6Address("::"), 1), Form.MANGLED),
        ("_65535._1--._b", AddressTarget("b", IPv6Address("1::"), 65535), Form.MANGLED),
        ("_1._1-0-0-2--3._b", AddressTarget("b", IPv6Address("1:0:0:2::3"), 1), Form.MANGLED),
        ("_1._1-2-3-4-5-6-7-8._b", AddressTarget("b", IPv6Address("1:2:3:4:5:6:7:8"), 1), Form.MANGLED),
        ("_8443.orders.shop._b", ServiceTarget("b", "orders.shop", 8443), Form.MANGLED),
        ("_8443.or_ders.s__p._b", ServiceTarget("b", "or_ders.s__p", 8443), Form.MANGLED),
        ("p8443-or_ders.shop.b", ServiceTarget("b", "or_ders.shop", 8443), Form.COMPACT),
        ("_8443.p1-x.10-1-0-5._b", ServiceTarget("b", "p1-x.10-1-0-5", 8443), Form.MANGLED),
        ("p8443-10-1-0-5.b", AddressTarget("b", IPv4Address("10.1.0.5"), 8443), Form.COMPACT),
        ("p1-x" + "0" * 31 + "1.b", AddressTarget("b", IPv6Address("::1"), 1), Form.COMPACT),
        ("p8443-orders.shop.b", ServiceTarget("b", "orders.shop", 8443), Form.COMPACT),
        ("p8443-10-1-0-5.shop.b", ServiceTarget("b", "10-1-0-5.shop", 8443), Form.COMPACT),
        ("p8443-p1-a.p1-team.b", ServiceTarget("b", "p1-a.p1-team", 8443), Form.COMPACT),
        ("p8443-orders.p0-team.svc.b", ServiceTarget("b", "orders.p0-team.svc", 8443), Form.COMPACT),
    ],
)
def test_forms(name: str, target: AddressTarget | ServiceTarget, form: Form) -> None:
    assert decode(f"{name}.{D}", D) == target
    assert encode(target, D, form) == f"{name}.{D}"


def test_a_plain_name_is_the_same_in_both_forms() -> None:
    target = decode("Orders.Shop.svc.cluster.local.", D)
    assert target == PlainName("orders.shop.svc.cluster.local")
    assert {encode(target, D, form) for form in Form} == {"orders.shop.svc.cluster.local"}


def test_case_one_dot_and_bytes_do_not_matter() -> None:
    expected = AddressTarget("b", IPv6Address("fd00::5"), 8443)
    for name in ("_8443._FD00--5._B.SVC.Mesh.internal.", b"_8443._fd00--5._b.svc.mesh.internal"):
        assert decode(name, "SVC.mesh.INTERNAL.") == expected


def test_a_domain_with_the_same_ending_is_another_domain() -> None:
    assert decode("p8443-10-1-0-5.b.xsvc.mesh.internal", D) == PlainName("p8443-10-1-0-5.b.xsvc.mesh.internal")
    assert is_under("b." + D, D)
    assert is_under(D, D)
    assert not is_under("x" + D, D)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", NameReason.EMPTY),
        (".", NameReason.EMPTY),
        ("a.b..", NameReason.BAD_LABEL),
        (".a.b", NameReason.BAD_LABEL),
        ("a..b", NameReason.BAD_LABEL),
        ("a" * 64 + ".b", NameReason.LABEL_TOO_LONG),
        (".".join(["a" * 49] * 5 + ["bcd"]) + ".e", NameReason.TOO_LONG),
        ("a" * 1_000_000, NameReason.TOO_LONG),
        ("a b.c", NameReason.BAD_CHARACTER),
        ("a\0.c", NameReason.BAD_CHARACTER),
        ("bücher.example", NameReason.BAD_CHARACTER),
        ("\u212a8s.example", NameReason.BAD_CHARACTER),  # KELVIN SIGN lower-cases to an ASCII k
        ("shop", NameReason.NOT_A_TARGET),
        ("10.1.0.5", NameReason.NOT_A_TARGET),
        ("_0._10-1-0-5._b.D", NameReason.BAD_PORT),
        ("_08443._10-1-0-5._b.D", NameReason.BAD_PORT),
        ("_65536._10-1-0-5._b.D", NameReason.BAD_PORT),
        ("_x._10-1-0-5._b.D", NameReason.BAD_PORT),
        ("8443._10-1-0-5._b.D", NameReason.BAD_PORT),
        ("_99999.orders.shop._b.D", NameReason.BAD_PORT),
        ("p0-10-1-0-5.b.D", NameReason.BAD_PORT),
        ("p08-10-1-0-5.b.D", NameReason.BAD_PORT),
        ("p65536-10-1-0-5.b.D", NameReason.BAD_PORT),
        ("_8443._10-1-0-256._b.D", NameReason.BAD_ADDRESS),
        ("_8443._10-1-0-05._b.D", NameReason.BAD_ADDRESS),
        ("_8443._10-1-5._b.D", NameReason.BAD_ADDRESS),
        ("_8443._10-1-0-5-._b.D", NameReason.BAD_ADDRESS),
        ("_8443._fd00-0-0-0-0-0-0-5._b.D", NameReason.BAD_ADDRESS),
        ("_8443._fd00--0-5._b.D", NameReason.BAD_ADDRESS),
        ("_8443._fd00--05._b.D", NameReason.BAD_ADDRESS),
        ("_8443._fd00---5._b.D", NameReason.BAD_ADDRESS),
        ("_8443._--ffff-a01-5._b.D", NameReason.BAD_ADDRESS),
        ("_8443._-1._b.D", NameReason.BAD_ADDRESS),
        ("_8443.__--1._b.D", NameReason.BAD_ADDRESS),
        ("p8443-10-1-0-256.b.D", NameReason.BAD_ADDRESS),
        ("p8443-10-1.b.D", NameReason.BAD_ADDRESS),
        ("p8443-xfd00.b.D", NameReason.BAD_ADDRESS),
        ("p8443-x" + "0" * 33 + ".b.D", NameReason.BAD_ADDRESS),
        ("p8443-x" + "0" * 20 + "ffff0a010005.b.D", NameReason.BAD_ADDRESS),
        ("_8443.shop._b.D", NameReason.NOT_A_TARGET),
        ("_8443._b.D", NameReason.NOT_A_TARGET),
        ("_1._8443._10-1-0-5._b.D", NameReason.NOT_A_TARGET),
        ("_8443.orders._shop._b.D", NameReason.NOT_A_TARGET),
        ("_8443._orders.shop._c.D", NameReason.BAD_LABEL),
        ("a._8443.orders.shop._b.D", NameReason.BAD_LABEL),
        ("_8443.-orders.shop._b.D", NameReason.BAD_LABEL),
        ("_8443.orders.p1-10-1-0-5._b.D", NameReason.BAD_LABEL),
        ("p8443-orders.p1-10-1-0-5.b.D", NameReason.BAD_LABEL),
        ("p8443-orders.shop_.b.D", NameReason.BAD_LABEL),
        ("_8443.orders.shop.b.D", NameReason.BAD_LABEL),
        ("p8443-10-1-0-5._b.D", NameReason.BAD_LABEL),
        ("_8443._10-1-0-5.__b.D", NameReason.BAD_LABEL),
        ("_8443._10-1-0-5._.D", NameReason.BAD_LABEL),
        ("-b.D", NameReason.BAD_LABEL),
        ("D", NameReason.INCOMPLETE),
        ("b.D", NameReason.INCOMPLETE),
        ("_b.D", NameReason.INCOMPLETE),
        ("_10-1-0-5._b.D", NameReason.INCOMPLETE),
        ("_fd00--5._b.D", NameReason.INCOMPLETE),
        ("shop.b.D", NameReason.INCOMPLETE),
        ("shop._b.D", NameReason.INCOMPLETE),
        ("orders.shop.b.D", NameReason.INCOMPLETE),
        ("orders.shop._b.D", NameReason.INCOMPLETE),
        ("p1-team.b.D", NameReason.INCOMPLETE),
        ("p0-orders.shop.b.D", NameReason.INCOMPLETE),
        ("p1--orders.shop.b.D", NameReason.INCOMPLETE),
    ],
)
def test_refusals(name: str, reason: NameReason) -> None:
    name = name[:-1] + D if name == "D" or name.endswith(".D") else name
    with pytest.raises(BadName) as caught:
        decode(name, D)
    assert caught.value.reason is reason
    assert caught.value.detail.isprintable()
    assert len(caught.value.detail) < 700


@given(targets, domains, st.sampled_from(Form))
@example(AddressTarget("b", IPv6Address("::1"), 1), D, Form.MANGLED)
@example(ServiceTarget("b", "a.p1-10-1-0-5", 1), D, Form.COMPACT)
def test_round_trip(target: AddressTarget | ServiceTarget | PlainName, domain: str, form: Form) -> None:
    try:
        name = encode(target, domain, form)
    except BadName as error:
        # Only targets that cannot have a name: because of the length, a label that looks like an address, or the mesh domain.
        if error.reason in (NameReason.TOO_LONG, NameReason.LABEL_TOO_LONG, NameReason.BAD_LABEL):
            return
        if isinstance(target, PlainName):
            return
        raise
    assert decode(name, domain) == target
    assert decode(name.upper().encode() + b".", domain) == target
    assert len(name) <= 253
    assert all(0 < len(label) <= 63 for label in name.split("."))


@given(targets, st.sampled_from(Form))
def test_every_name_above_a_valid_one_exists(target: AddressTarget | ServiceTarget | PlainName, form: Form) -> None:
    """DNS must not answer NXDOMAIN for them: by RFC 8020 a resolver could then treat all names below as absent."""
    try:
        name = encode(target, D, form)
    except BadName:
        assume(False)
    name = name.partition(".")[2]
    while is_under(name, D):
        with pytest.raises(BadName) as caught:
            decode(name, D)
        assert caught.value.reason is NameReason.INCOMPLETE
        name = name.partition(".")[2]


@given(st.one_of(st.text(max_size=300), st.binary(max_size=300)), st.booleans())
def test_garbage_gives_badname_only(name: str | bytes, under: bool) -> None:
    if under:
        name = name + "." + D if isinstance(name, str) else name + b"." + D.encode()
    try:
        target = decode(name, D)
    except BadName as error:
        detail = error.detail
    else:
        assert normalise(name) in {encode(target, D, form) for form in Form}
        return
    assert detail.isprintable()


near_misses = st.lists(
    st.one_of(
        st.from_regex(r"(_|p)?[0-9]{0,6}-?(x?[0-9a-f-]{0,34}|[a-z0-9-]{0,10})", fullmatch=True), labels, st.just("_b")
    ),
    min_size=1,
    max_size=5,
).map(".".join)


@given(near_misses)
def test_accepted_names_are_canonical(name: str) -> None:
    name = f"{name}.{D}"
    try:
        target = decode(name, D)
    except BadName:
        return
    assert name in {encode(target, D, form) for form in Form}


@given(st.text(alphabet=INSIDE + "._", max_size=260), domains)
def test_any_domain_gives_badname_only(domain: str, name: str) -> None:
    try:
        decode(name, domain)
    except BadName:
        pass


@pytest.mark.parametrize(
    "target",
    [
        AddressTarget("B", IPv4Address("10.1.0.5"), 1),
        AddressTarget("b", IPv4Address("10.1.0.5"), 0),
        AddressTarget("b", IPv4Address("10.1.0.5"), 65536),
        AddressTarget("b", IPv6Address("::ffff:10.1.0.5"), 1),
        AddressTarget("b", IPv6Address("fe80::1%eth0"), 1),
        AddressTarget("b.c", IPv4Address("10.1.0.5"), 1),
        AddressTarget("a" * 64, IPv4Address("10.1.0.5"), 1),
        ServiceTarget("b", "orders", 1),
        ServiceTarget("b", "", 1),
        ServiceTarget("b", "Orders.shop", 1),
        ServiceTarget("b", "orders..shop", 1),
        ServiceTarget("b", "_orders.shop", 1),
        ServiceTarget("b", ".".join(["a" * 60] * 4), 1),
        PlainName("shop"),
        PlainName("Orders.shop"),
        PlainName("orders.shop."),
        PlainName("p1-10-1-0-5.b." + D),
        PlainName(D),
        PlainName(""),
    ],
)
def test_invalid_targets_have_no_name(target: AddressTarget | ServiceTarget | PlainName) -> None:
    for form in Form:
        with pytest.raises(BadName):
            encode(target, D, form)


def test_a_long_first_label_fits_only_the_mangled_form() -> None:
    target = ServiceTarget("b", "a" * 60 + ".shop", 8443)
    assert decode(encode(target, D, Form.MANGLED), D) == target
    with pytest.raises(BadName) as caught:
        encode(target, D, Form.COMPACT)
    assert caught.value.reason is NameReason.LABEL_TOO_LONG


def test_the_longest_name_is_253() -> None:
    tail = f"p1-a.b.{D}"
    for extra, good in ((0, True), (1, False)):
        filler = "x" * 60 + "." + "y" * 60 + "." + "z" * 60 + "." + "w" * (253 - len(tail) - 1 - 183 + extra)
        name = f"p1-a.{filler}.b.{D}"
        assert len(name) == 253 + extra
        if good:
            assert isinstance(decode(name, D), ServiceTarget)
        else:
            with pytest.raises(BadName):
                decode(name, D)


def test_service_names() -> None:
    for good in ("orders.shop", "a_b.c", "web_1.my__project", "x.y_z"):
        assert is_service_name(good)
    for bad in (
        "orders",
        "orders.",
        "Orders.shop",
        "_a.b",
        "a_.b",
        "a._b",
        "_443.a.b",
        "10.1.0.5",
        "",
        ".".join(["a" * 62] * 5),
    ):
        assert not is_service_name(bad)
