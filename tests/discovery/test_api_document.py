"""The examples of API.md, run by a shell against a real server."""

import asyncio
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import trustme

from discovery.api.timing import ServerTiming, WatchTiming
from discovery.api.tokens import format_entry, make_entry, make_token
from discovery.model.mesh import Kind

pytestmark = [pytest.mark.anyio, pytest.mark.needs("curl")]

DOCUMENT = resources.files("discovery").joinpath("API.md").read_text()
ANYTHING = "…"
LIMIT_S = 50.0


@dataclass(frozen=True)
class Example:
    """A command and its expected output."""

    command: str
    language: str
    """Language of the block with the output; empty if there is none."""

    printed: str


def examples() -> list[Example]:
    """Return the shell commands of the document, each with the block that follows it."""
    blocks = re.findall(r"(<!-- not run -->\n)?^```(\w+)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    found = []
    for index, (skipped, language, text) in enumerate(blocks):
        if language == "sh" and not skipped:
            _, following, printed = blocks[index + 1] if index + 1 < len(blocks) else ("", "sh", "")
            found.append(Example(text, *(("", "") if following == "sh" else (following, printed))))
    return found


def alike(expected: Any, found: Any) -> bool:
    """Compare two values. The expected one may contain wildcards."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return expected.keys() == found.keys() and all(alike(expected[key], found[key]) for key in expected)
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(map(alike, expected, found))
    return expected in (ANYTHING, found)


def printed_as(example: Example, output: str) -> bool:
    """Return whether a command's output matches its example."""
    match example.language:
        case "":
            return output == ""
        case "json":
            return alike(json.loads(example.printed), json.loads(output))
        case "ndjson":
            expected, found = ([json.loads(line) for line in text.splitlines()] for text in (example.printed, output))
            return alike(expected, found)
        case "http":  # some of the header lines, in any order
            lines = output.splitlines()
            patterns = [re.escape(line).replace(ANYTHING, ".+") for line in example.printed.splitlines()]
            return all(any(re.fullmatch(pattern, line, re.IGNORECASE) for line in lines) for pattern in patterns)
    raise AssertionError(f"an example prints {example.language!r}, which is not compared with anything")


async def test_every_example_does_what_it_says(serve: Any, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name, host in (("server", "127.0.0.1"), ("gw-2", "gw-2.b.example")):
        issued = authority.issue_cert(host)
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    token, admin = make_token(), make_token()
    entries = [
        make_entry(token, network="b", kinds=list(Kind), names=["*.shop.example"]),
        make_entry(admin, admin=True),
        make_entry(None, certificate="gw-2.b.example", network="b", kinds=[Kind.GATEWAY]),
    ]
    (tmp_path / "tokens.yaml").write_text("\n".join(map(format_entry, entries)))
    asked = examples()
    assert len(asked) > 10
    for number, example in enumerate(
        asked
    ):  # in braces, not parentheses: later commands use variables that earlier ones set
        (tmp_path / f"{number}.sh").write_text(f"{{\n{example.command}}} >{number}.out 2>{number}.err\n")
    (tmp_path / "all.sh").write_text("".join(f". ./{number}.sh\n" for number in range(len(asked))))
    async with serve(
        tls_cert=tmp_path / "server.pem",
        tls_key=tmp_path / "server.key",
        tls_client_ca=tmp_path / "ca.pem",
        tokens_file=tmp_path / "tokens.yaml",
        turn_secrets={"a": "secret"},
        timing=ServerTiming(
            watch=WatchTiming(heartbeat_s=0.05)
        ),  # curl notices at its next write that the pipe was closed
    ) as at:
        surroundings = {"SERVER": at.url, "TOKEN": token, "ADMIN": admin, "CURL_CA_BUNDLE": str(tmp_path / "ca.pem")}
        shell = await asyncio.create_subprocess_exec(
            "/usr/bin/env", *(f"{key}={value}" for key, value in surroundings.items()), "sh", "all.sh", cwd=tmp_path
        )
        try:
            async with asyncio.timeout(LIMIT_S):
                await shell.wait()
        finally:
            if shell.returncode is None:
                shell.kill()
                await shell.wait()
    for number, example in enumerate(asked):
        output, errors = ((tmp_path / f"{number}.{end}").read_text() for end in ("out", "err"))
        assert printed_as(example, output), (
            f"{example.command}\nprinted\n{output}{errors}\nin place of\n{example.printed}"
        )
