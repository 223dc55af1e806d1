"""What the sections read of the machine. Their rules are told in test_config.py, line by line."""

from pathlib import Path

from crossnet.sections import search_domains


def test_the_last_search_line_counts_and_what_names_no_zone_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 10.0.0.1\ndomain old.example\nsearch Corp.Example. . bad..name other.example\n")
    assert search_domains(path) == ("corp.example", "other.example")


def test_a_machine_without_a_resolver_has_none(tmp_path: Path) -> None:
    assert search_domains(tmp_path / "absent") == ()
