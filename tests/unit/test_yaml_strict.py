"""YAML as people expect it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.settings.yaml_strict import read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("1_000", 1000),
        ("-7", -7),
        ("010", "010"),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("04:00:00", "04:00:00"),
        ("2024-01-01", "2024-01-01"),
        ("0x1f", "0x1f"),
        ("'1e-4'", "1e-4"),
    ],
)
def test_plain_scalars(text: str, value: object) -> None:
    found = read_yaml(text).value
    assert found == value and type(found) is type(value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=6,
    )
)
def test_what_is_written_reads_back(value: object) -> None:
    document = read_yaml(write_yaml({"key": value}))
    assert document.problems == []
    assert document.value == {"key": value}


@given(st.text())
def test_reading_never_raises(text: str) -> None:
    read_yaml(text)
