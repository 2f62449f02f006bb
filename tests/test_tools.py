"""The soak and the fuzzer of tests/tools, for a few seconds each."""

from __future__ import annotations

import pytest
from tools import fuzz
from tools.soak import Soak

TARGETS = sorted(name[len("fuzz_") :] for name in dir(fuzz.Fuzzer) if name.startswith("fuzz_"))


@pytest.mark.slow
def test_soak_of_a_few_seconds_balances_the_account_of_every_event(tmp_path):
    soak = Soak(tmp_path, seconds=8, seed=3, rate=1000)
    assert soak.run() == [] and soak.feeder.pushed > 3000


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_odd_from_outside_raises_anything_or_gets_lost(tmp_path, target):
    cases, failures = fuzz.run(tmp_path, seconds=0.7, seed=12, only=[target])
    assert failures == [] and cases > 0
