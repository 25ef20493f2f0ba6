"""How many points of a gap each repair explains."""

from bnlab.health.attribution import Attribution, Explained
from bnlab.health.compare import Comparison


def comparison(before: int, after: int) -> Comparison:
    return Comparison.measure([1] * before + [0] * (100 - before), [1] * after + [0] * (100 - after))


def test_what_is_not_explained_is_the_rest_of_the_gap() -> None:
    cause = Explained(cause="stale statistics", check="BN102", alone=comparison(50, 80))
    found = Attribution(gap=comparison(50, 90), causes=(cause,), together=comparison(50, 85))
    assert round(found.unexplained, 9) == 5
    assert found.to_json()["causes"][0]["alone"]["after"] == 0.8
    assert round(Attribution(gap=comparison(50, 90), causes=(), together=None).unexplained, 9) == 40
