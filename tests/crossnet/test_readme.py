"""The examples in the README and in docs/ are valid."""

import re
from pathlib import Path

import pytest

from crossnet.cli.main import main
from crossnet.config.file import load

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "SECURITY.md", "CONTRIBUTING.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
README = PAGES[0].read_text()


def shown(page: Path) -> dict[str, str]:
    """The files that a page shows, by name."""
    return dict(re.findall(r"`([\w.]+\.yaml)`:\n\n```yaml\n(.*?)```", page.read_text(), re.DOTALL))


@pytest.mark.parametrize(
    ("page", "roles"),
    [
        ("README.md", {"a.yaml": ("discovery_server", "turn", "dns", "relay"), "b.yaml": ("gateway",)}),
        ("docs/discovery.md", {"relay.yaml": ("relay",)}),
    ],
)
def test_its_files_are_good_configuration(tmp_path: Path, page: str, roles: dict[str, tuple[str, ...]]) -> None:
    files = shown(ROOT / page) | {"ab.key": "0a" * 32, "turn.secret": "secret"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert {name: load(tmp_path / name).roles for name in roles} == roles


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 100


def test_its_commands_are_there(capsys: object) -> None:
    for command in ("lab", "run", "check", "status", "name", "records", "token"):
        assert f"crossnet {command}" in README
        assert main([command, "--help"]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_are_named_are_there(page: Path) -> None:
    packages = ("crossnet", "discovery", "sniproxy", "turnreg", "dnsgw", "tests", "bench")
    for path in re.findall(rf"`((?:{'|'.join(packages)})/[\w/.]*)`", page.read_text()):
        assert (ROOT / path).exists(), path
