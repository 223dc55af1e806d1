"""What the README shows is good."""

import re
from pathlib import Path

from crossnet.cli.main import main
from crossnet.config.file import load

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_its_files_are_good_configuration(tmp_path: Path) -> None:
    shown = dict(re.findall(r"`([\w.]+)`:\n\n```yaml\n(.*?)```", README, re.DOTALL))
    assert shown.keys() == {"mesh.yaml", "relay.yaml"}
    for name, text in shown.items():
        (tmp_path / name).write_text(text)
    config = load(tmp_path / "relay.yaml")
    assert config.roles == ("relay",)


def test_its_commands_are_there(capsys: object) -> None:
    for command in ("lab", "run", "check", "status", "name", "records", "token"):
        assert f"crossnet {command}" in README
        assert main([command, "--help"]) == 0


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([A-Z][^)#]*)\)", README):
        assert (ROOT / target).is_file()
