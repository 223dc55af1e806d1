"""Unmodified programs that use our server as their resolver: libc, musl, Java and Node.

The rows are those of what stub resolvers were measured to do. Above all: a relay with IPv4 only must be enough for musl,
which takes anything but NODATA for the other half of a pair as the failure of the whole, and no answer of ours may make
anybody ask twice.
"""

import shutil
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from tests.dnsgw.namespace import CLUSTER, Namespace
from tests.support.dns_meshes import DOMAIN

pytestmark = [pytest.mark.netns, pytest.mark.interop, pytest.mark.needs("netns", "nsenter")]

ADDRESS = f"p8443-10-1-0-5.b.{DOMAIN}"
FOUND = {
    # Four dots are fewer than ndots:5, so that every expansion of the search list is asked for first.
    ADDRESS: ["10.0.0.9"],
    ADDRESS.upper() + ".": ["10.0.0.9"],
    f"_8443._10-1-0-5._b.{DOMAIN}": ["10.0.0.9"],
    f"_8443.orders.shop._b.{DOMAIN}.": ["10.0.0.9"],
    f"p8443-orders.shop.b.{DOMAIN}": ["10.0.0.9"],
    f"orders.shop.{CLUSTER}.": ["10.0.0.9"],
    f"orders.shop.{CLUSTER}": ["10.0.0.9"],
    "orders.shop": ["10.0.0.9"],
    "orders": ["10.0.0.9"],
    "www.example.test": ["192.0.2.1", "2001:db8::1"],
    "v4.example.test.": ["192.0.2.2"],
    "alias.example.test": ["192.0.2.2"],
    "cart.shop": ["192.0.2.7"],  # upstream has it, and goes first
    "six.shop": ["2001:db8::7"],  # upstream has but the other half of the pair
}
MISSING = [
    f"p8443-10-1-0-5.nope.{DOMAIN}",
    f"p8443-orders.nope.b.{DOMAIN}.",
    "nope.example.test",
    "nope.shop",
    "nope",
    "printer.local",
]
EMPTY = [f"b.{DOMAIN}.", DOMAIN + "."]

MUSL_C = r"""
#include <netdb.h>
#include <stdio.h>
#include <arpa/inet.h>
int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        struct addrinfo hints = { .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM }, *found = 0, *a;
        int error = getaddrinfo(argv[i], 0, &hints, &found);
        printf("%s", error == EAI_NONAME ? "missing" : error == EAI_NODATA ? "missing" : error ? "failed" : "");
        for (a = found; a; a = a->ai_next) {
            char text[64], sink[1];
            getnameinfo(a->ai_addr, a->ai_addrlen, text, sizeof text, 0, 0, NI_NUMERICHOST);
            printf("%s ", text);
        }
        printf("\n");
        if (found) freeaddrinfo(found);
    }
}
"""
GLIBC_PY = """
import socket, sys
for name in sys.argv[1:]:
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
        print(*[item[4][0] for item in found])
    except socket.gaierror as error:
        print("missing" if error.args[0] in (socket.EAI_NONAME, socket.EAI_NODATA) else "failed")
"""
JAVA = """
import java.net.*;
public class Resolve {
    public static void main(String[] names) {
        for (String name : names) {
            StringBuilder line = new StringBuilder();
            try {
                for (InetAddress a : InetAddress.getAllByName(name)) line.append(a.getHostAddress()).append(' ');
            } catch (UnknownHostException e) {
                line.append(e.getMessage().contains("Temporary") ? "failed" : "missing");
            }
            System.out.println(line);
        }
    }
}
"""
NODE_JS = """
const dns = require('node:dns').promises;
(async () => {
  for (const name of process.argv.slice(1)) {
    const halves = await Promise.allSettled([dns.resolve4(name), dns.resolve6(name)]);
    const found = halves.flatMap(half => half.value ?? []);
    const codes = halves.map(half => half.reason?.code).filter(code => code);
    const missing = codes.length == 2 && codes.every(code => code == 'ENOTFOUND' || code == 'ENODATA');
    console.log(found.length ? found.join(' ') : missing ? 'missing' : 'failed');
  }
})();
"""


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespace]:
    with Namespace(tmp_path_factory.mktemp("namespace")) as made:
        yield made


@pytest.fixture(autouse=True)
def counts_from_here(namespace: Namespace) -> None:
    namespace.tell()


@pytest.fixture(scope="module")
def musl(tmp_path_factory: pytest.TempPathFactory, namespace: Namespace) -> list[str]:
    directory = tmp_path_factory.mktemp("musl")
    (directory / "resolve.c").write_text(MUSL_C)
    program = directory / "resolve"
    namespace.run("musl-gcc", "-static", "-o", str(program), str(directory / "resolve.c"))
    return [str(program)]


def glibc() -> list[str]:
    # The system's Python, for the system's libc; -I: nothing of ours on its path.
    return [shutil.which("python3", path="/usr/bin:/usr/local/bin:/bin") or "python3", "-I", "-c", GLIBC_PY]


def resolve(namespace: Namespace, program: list[str], *names: str) -> list[list[str]]:
    lines = namespace.run(*program, *names).splitlines()
    assert len(lines) == len(names)
    return [sorted({plain(word) for word in line.split()}) for line in lines]


def plain(text: str) -> str:
    """Java writes IPv6 addresses out in full."""
    return str(ip_address(text)) if ":" in text else text


def check_all(namespace: Namespace, program: list[str], found: dict[str, list[str]] = FOUND) -> None:
    names = [*found, *MISSING, *EMPTY]
    expected = [*found.values(), *([["missing"]] * (len(MISSING) + len(EMPTY)))]
    got = resolve(namespace, program, *names)
    assert dict(zip(names, got, strict=True)) == dict(zip(names, expected, strict=True))


def counts(namespace: Namespace) -> dict[str, Any]:
    answer: dict[str, Any] = namespace.tell()
    return answer


@pytest.mark.needs("python3")
def test_glibc_resolves_all_of_it(namespace: Namespace) -> None:
    check_all(namespace, glibc())


@pytest.mark.needs("musl-gcc")
def test_musl_resolves_all_of_it(namespace: Namespace, musl: list[str]) -> None:
    check_all(namespace, musl)


@pytest.mark.parametrize("libc", ["glibc", pytest.param("musl", marks=pytest.mark.needs("musl-gcc"))])
def test_a_pair_of_ours_is_two_questions_and_none_for_upstream(
    namespace: Namespace, request: pytest.FixtureRequest, libc: str
) -> None:
    program = glibc() if libc == "glibc" else request.getfixturevalue("musl")
    namespace.tell()
    assert resolve(namespace, program, ADDRESS + ".") == [["10.0.0.9"]]
    assert counts(namespace) == {"counts": {"answered": 1, "nodata": 1}, "upstream": []}
    assert resolve(namespace, program, f"x.nope.{DOMAIN}.") == [["missing"]]
    assert counts(namespace) == {"counts": {"nxdomain": 2}, "upstream": []}
    assert resolve(namespace, program, f"b.{DOMAIN}.") == [["missing"]]
    assert counts(namespace) == {"counts": {"nodata": 2}, "upstream": []}


@pytest.mark.parametrize("libc", ["glibc", pytest.param("musl", marks=pytest.mark.needs("musl-gcc"))])
def test_the_search_list_goes_on_until_the_import(
    namespace: Namespace, request: pytest.FixtureRequest, libc: str
) -> None:
    program = glibc() if libc == "glibc" else request.getfixturevalue("musl")
    namespace.tell()
    assert resolve(namespace, program, "orders.shop") == [["10.0.0.9"]]
    told = counts(namespace)
    ours = {"answered": 1, "nodata": 1}
    # orders.shop.shop.svc… is nobody's: NXDOMAIN, which upstream says. NODATA would have ended the search for musl.
    # Who asks second is told by the cache.
    assert told["counts"] in ({"forwarded": 2, **ours}, {"cached": 2, **ours}, {"forwarded": 1, "cached": 1, **ours})
    # Whether the name itself is upstream's may still be known from the test before.
    asked = {name.split()[0] for name in told["upstream"]}
    assert asked <= {f"orders.shop.{CLUSTER}", f"orders.shop.shop.{CLUSTER}"}


@pytest.mark.parametrize("libc", ["glibc", pytest.param("musl", marks=pytest.mark.needs("musl-gcc"))])
def test_without_a_relay_it_is_a_failure_for_now_and_not_a_missing_name(
    namespace: Namespace, request: pytest.FixtureRequest, libc: str
) -> None:
    program = glibc() if libc == "glibc" else request.getfixturevalue("musl")
    namespace.tell(alive=False)
    try:
        assert resolve(namespace, program, ADDRESS + ".") == [["failed"]]
    finally:
        namespace.tell(alive=True)
    assert resolve(namespace, program, ADDRESS + ".") == [["10.0.0.9"]]


def test_glibc_asks_again_over_tcp_when_an_answer_is_too_long(namespace: Namespace) -> None:
    (found,) = resolve(namespace, glibc(), "big.example.test.")
    assert len(found) == 60


@pytest.mark.skipif(shutil.which("java") is None or shutil.which("javac") is None, reason="no JDK is installed")
def test_java_resolves_all_of_it(namespace: Namespace, tmp_path: Path) -> None:
    (tmp_path / "Resolve.java").write_text(JAVA)
    check_all(namespace, ["java", "-XX:TieredStopAtLevel=1", str(tmp_path / "Resolve.java")])


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_node_resolves_by_itself_too(namespace: Namespace) -> None:
    """c-ares, which has a resolver of its own, asks for the two halves apart and knows no search list."""
    names = {name: found for name, found in FOUND.items() if name.count(".") > 1}
    check_all(namespace, ["node", "-e", NODE_JS, "--"], names)
    assert "malformed" not in counts(namespace)["counts"]
