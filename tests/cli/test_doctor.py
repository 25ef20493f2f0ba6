"""The verb's own options: the list and the pages of the checks."""

import json
from collections.abc import Callable

from bnlab.health.registry import all_checks
from tests.conftest import Outcome

Run = Callable[..., Outcome]


def test_the_checks_are_listed(bnlab: Run) -> None:
    done = bnlab("doctor", "--list", "--json")
    assert [check["id"] for check in json.loads(done.out)] == [entry.check.id for entry in all_checks()]
    assert "BN102  stale-statistics" in bnlab("doctor", "--list").out


def test_a_check_is_explained(bnlab: Run) -> None:
    done = bnlab("doctor", "--explain", "stale-statistics")
    assert done.status == 0
    assert done.out.startswith("# BN102 stale-statistics")
    for heading in ("## What it measures", "## Known limits", "## Remedy"):
        assert heading in done.out
    assert "there is no check 'BN999'" in bnlab("doctor", "--explain", "BN999").complaint


def test_model_and_data_are_needed(bnlab: Run) -> None:
    assert "MODEL is missing" in bnlab("doctor").complaint
    assert "--data is missing" in bnlab("doctor", "x.safetensors").complaint
