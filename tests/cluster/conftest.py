"""The `cluster` fixture: two fresh nodes for one test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.namespaces import what_is_missing
from tests.cluster.two_nodes import PROGRAMS, TwoNodes


@pytest.fixture(scope="session")
def _nodes_can_be_made() -> None:
    if missing := what_is_missing(PROGRAMS):
        pytest.skip(missing)


@pytest.fixture
def cluster(_nodes_can_be_made: None, tmp_path: Path) -> Iterator[TwoNodes]:
    scratch = tmp_path / "cluster"
    scratch.mkdir()
    with TwoNodes(scratch) as nodes:
        yield nodes
