from __future__ import annotations

import pytest
from tools.soak import Soak


@pytest.mark.slow
def test_soak_of_a_few_seconds_balances_the_account_of_every_event(tmp_path):
    soak = Soak(tmp_path, seconds=8, seed=3, rate=1000)
    assert soak.run() == []
    assert soak.counts["kill"] and soak.counts["stop"] and soak.feeder.pushed > 3000
