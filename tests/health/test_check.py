"""Findings, and the pages of checks."""

import json

from bnlab.health.check import Check, finding_key, name_layers, sections
from bnlab.health.compare import Comparison

CHECK = Check(id="BN999", name="a-fault", severity="warn", stage="preview", safety="safe")
COST = Comparison.measure([0] * 30 + [1] * 70, [1] * 90 + [0] * 10)


def test_a_finding_has_the_severity_and_safety_of_its_check_unless_given() -> None:
    finding = CHECK.finding(message="m", cause="c", remedy="r")
    assert (finding.id, finding.severity, finding.safety) == ("BN999", "warn", "safe")
    assert CHECK.finding(message="m", cause="c", remedy="r", severity="error").severity == "error"


def test_the_document_of_a_finding_is_json_in_points() -> None:
    finding = CHECK.finding(message="m", cause="c", remedy="r", layers=("a",), numbers={"x": 1.0}, cost=COST)
    document = json.loads(json.dumps(finding.to_json(), allow_nan=False))
    assert round(document["cost_points"], 9) == 20
    assert document["interval"] == [100 * x for x in COST.interval]
    assert document["p"] == COST.p_value
    assert {*document} >= {"id", "name", "severity", "layers", "numbers", "cause", "remedy", "command"}
    assert CHECK.finding(message="m", cause="c", remedy="r").to_json()["cost_points"] is None


def test_the_text_of_a_finding_has_message_cost_cause_and_remedy() -> None:
    text = str(CHECK.finding(message="it is broken", cause="a bug", remedy="mend it", cost=COST))
    assert text.startswith("BN999 a-fault: it is broken; it costs accuracy: 70.0% instead of 90.0% on 100 images")
    assert text.endswith("Likely cause: a bug. Remedy: mend it")


def test_the_key_does_not_depend_on_the_order_of_layers() -> None:
    assert finding_key("BN1", ["b", "a"]) == finding_key("BN1", ("a", "b")) == "BN1 a b"


def test_many_layers_are_cut() -> None:
    assert name_layers(["a", "b"], of=5) == "2 of 5 layers (a, b)"
    assert name_layers([str(i) for i in range(20)]) == "20 layers (0, 1, 2, 3, 4, 5, 6, 7, and 12 more)"


def test_sections_of_a_page() -> None:
    assert sections("Title.\n\n## One\n\ntext\n\n## Two\n\nmore") == ("Title.", {"One": "text", "Two": "more"})
