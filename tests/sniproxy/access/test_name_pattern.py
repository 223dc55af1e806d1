"""Patterns of names: what they match, by themselves and in a tree."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniproxy.access.name_pattern import NamePattern, NameTree


@given(st.lists(st.sampled_from(["a", "b", "shop", "*", "**"]), min_size=2, max_size=5))
def test_a_pattern_matches_itself_with_labels_in_place_of_stars(labels: list[str]) -> None:
    text = ".".join(labels)
    if "**" in labels[1:]:
        with pytest.raises(ValueError, match="label"):
            NamePattern.parse(text)
        return
    assert NamePattern.parse(text).matches(text.replace("**", "x.y").replace("*", "z"))


LABELS = st.sampled_from(["a", "b", "shop"])
PATTERNS = st.lists(LABELS | st.just("*"), min_size=1, max_size=4).flatmap(
    lambda labels: st.sampled_from([["**", *labels], ["x", *labels], ["*", *labels]])
)


@given(st.lists(PATTERNS, max_size=8), st.lists(LABELS | st.just("x"), min_size=2, max_size=5))
def test_a_tree_finds_exactly_the_rules_whose_patterns_match(patterns: list[list[str]], labels: list[str]) -> None:
    texts, name = [".".join(pattern) for pattern in patterns], ".".join(labels)
    tree = NameTree()
    for index, text in enumerate(texts):
        tree.add(NamePattern.parse(text), index)
    assert tree.find(name) == {index for index, text in enumerate(texts) if NamePattern.parse(text).matches(name)}
