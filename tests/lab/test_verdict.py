import math

import pytest

from bnlab.lab.verdict import Evidence, Verdict, combined_verdict

HOLDS, NOT, UNSHOWN = Verdict.HOLDS, Verdict.DOES_NOT_HOLD, Verdict.NOT_SHOWN


def evidence(*values: float, **more: object) -> Evidence:
    return Evidence(what="it is more", values=values, **{"above": 0.0, **more})


def test_the_interval_is_student_t() -> None:
    """Of 1, 2, 3: mean 2, standard error 1 / sqrt(3), and 4.302653 is t's 97.5% point at two degrees of freedom."""
    low, high = evidence(1, 2, 3).interval
    half = 4.302652729911275 / math.sqrt(3)
    assert (low, high) == pytest.approx((2 - half, 2 + half))
    wide = evidence(1, 2, 3, level=0.99).interval
    assert wide[1] - wide[0] == pytest.approx(2 * 9.924843200918286 / math.sqrt(3))


@pytest.mark.parametrize(
    ("values", "more", "verdict"),
    [
        ((5.0, 5.1, 4.9), {}, HOLDS),
        ((-5.0, -5.1, -4.9), {}, NOT),
        ((5.0, -5.0, 1.0), {}, UNSHOWN),
        ((5.0, 5.1, 4.9), {"above": 6.0}, NOT),
        ((5.0, 5.1, 4.9), {"above": -math.inf, "below": 6.0}, HOLDS),
        ((0.1, 0.0, -0.1), {"above": -2.0, "below": 2.0}, HOLDS),
        ((3.1, 3.0, 2.9), {"above": -2.0, "below": 2.0}, NOT),
        ((2.1, 2.0, 1.9), {"above": -2.0, "below": 2.0}, UNSHOWN),
        ((5.0,), {}, UNSHOWN),
        ((0.0, 0.0, 0.0), {}, NOT),
        ((0.0, 0.0, 0.0), {"resolution": 0.2}, UNSHOWN),
        ((math.inf, 5.0, 5.0), {}, UNSHOWN),
        ((8.0, 8.1, 7.9), {"ratio": True, "above": 1.0}, HOLDS),
        ((8.0, 8.1, 7.9), {"ratio": True, "above": 14.0}, NOT),
        ((0.5, 2.0, 1.0), {"ratio": True, "above": 1.0}, UNSHOWN),
        ((0.0, 2.0, 1.0), {"ratio": True, "above": 1.0}, UNSHOWN),
        ((math.nan, 5.0, 5.0), {}, UNSHOWN),
        ((math.nan, 5.0, 5.0), {"ratio": True}, UNSHOWN),
        ((), {}, UNSHOWN),
        ((1.0, 1.4, 1.2), {}, HOLDS),
        ((1.0, 1.4, 1.2), {"overlap": 2.0}, UNSHOWN),
    ],
)
def test_the_complete_interval_has_to_lie_in_the_range(
    values: tuple[float, ...], more: dict[str, object], verdict: Verdict
) -> None:
    assert evidence(*values, **more).verdict == verdict


def test_seeds_that_split_the_same_photos_count_for_less() -> None:
    """Nadeau & Bengio 2003: however many they are, the error does not fall below that of the overlap."""
    low, high = evidence(1, 2, 3, overlap=0.5).interval
    half = 4.302652729911275 * math.sqrt(1 / 3 + 0.5)
    assert (low, high) == pytest.approx((2 - half, 2 + half))
    many = evidence(*range(1000), overlap=0.5)
    low, high = many.interval
    deviation = math.sqrt(1000 * 1001 / 12)  # of 0..999
    assert high - low == pytest.approx(2 * 1.9623 * deviation * math.sqrt(0.501), rel=1e-3)


def test_one_of_many_clauses_needs_a_stricter_level_to_refute() -> None:
    weak = evidence(-1.0, -1.3, -0.55)
    assert weak.verdict == NOT
    assert combined_verdict([weak]) == NOT
    assert combined_verdict([weak, *[evidence(1.0, 1.1, 0.9)] * 4]) == UNSHOWN


def test_a_study_may_not_correct_a_level_that_the_rule_corrects() -> None:
    with pytest.raises(AssertionError, match="corrected twice"):
        combined_verdict([evidence(1.0, 1.1, 0.9, level=0.975)] * 2)
    combined_verdict([evidence(1.0, 1.1, 0.9), evidence(1.0, 1.1, 0.9, level=0.975, primary=False)])


def test_ratios_are_averaged_as_logarithms() -> None:
    found = evidence(0.25, 4.0, ratio=True, above=1.0)
    assert found.mean == pytest.approx(1.0)
    assert found.interval[0] * found.interval[1] == pytest.approx(1.0)


def test_the_range_in_words() -> None:
    assert evidence(1.0).claimed == "> 0"
    assert evidence(1.0, above=-math.inf, below=2.5).claimed == "< 2.5"
    assert evidence(1.0, above=-2.0, below=2.0).claimed == "-2 to 2"


@pytest.mark.parametrize(
    ("means", "verdict"),
    [((1, 1), HOLDS), ((1, -1), NOT), ((1, None), UNSHOWN), ((-1, None), NOT), ((1, 1, "secondary"), HOLDS)],
)
def test_a_claim_holds_if_all_its_clauses_do(means: tuple[object, ...], verdict: Verdict) -> None:
    values = {1: (1.0, 1.1, 0.9), -1: (-1.0, -1.1, -0.9), None: (1.0, -1.0, 0.2), "secondary": (-1.0, -1.1, -0.9)}
    assert combined_verdict([evidence(*values[mean], primary=mean != "secondary") for mean in means]) == verdict


def test_json_has_no_infinity() -> None:
    document = evidence(5.0).to_json()
    assert (document["low"], document["high"], document["mean"], document["verdict"]) == (None, None, 5.0, "not shown")
