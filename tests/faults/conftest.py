"""The uninterrupted runs that the interrupted ones are compared with; each is made once."""

import pytest

from tests.faults.forked import Forked
from tests.faults.launched import TinyJob


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """Two ranks that split each sequence, ZeRO-3, a checkpoint after each of 9 steps."""
    job = TinyJob(tmp_path_factory.mktemp("uninterrupted"), cp=2, max_steps=9, checkpoint={"keep_last": 2})
    with Forked(job, 2) as ranks:
        assert ranks.wait() == 0, ranks.output[-8000:]
    return job
