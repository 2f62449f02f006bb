from __future__ import annotations

import pytest
from tools import fuzz

TARGETS = sorted(name[len("fuzz_") :] for name in dir(fuzz.Fuzzer) if name.startswith("fuzz_"))


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_odd_from_outside_raises_anything_or_gets_lost(tmp_path, target):
    cases, failures = fuzz.run(tmp_path, seconds=0.7, seed=12, only=[target])
    assert failures == [] and cases > 0
