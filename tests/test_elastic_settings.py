"""How many members a run may have, and what is said of those that would have nothing to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysegment.elastic.settings import ElasticConfig
from raysegment.elastic.train import idle
from tests.small_training import config


@pytest.mark.parametrize(
    ("cells", "per_cell", "workers", "members"), [((1, 1), 0, 3, 3), ((1, 3), 0, 2, 6), ((1, 3), 4, 2, 12), ((2, 2), 1, 1, 2)]
)
def test_workers_per_cell_go_before_the_runs_workers(cells, per_cell, workers, members):
    asked = config(Path("shards"), Path("run"), workers=workers, elastic=ElasticConfig(cells, per_cell))
    assert asked.members == members


def test_members_beyond_the_micro_batches_of_a_step_are_named(tmp_path):
    fits = config(tmp_path, tmp_path, workers=3)
    assert fits.learn.micro_batches == 3
    assert idle(fits) == []
    (said,) = idle(config(tmp_path, tmp_path, workers=4))
    assert said == "learn.global_batch: 3 micro-batches a step keep 3 members busy, and there may be 4"
