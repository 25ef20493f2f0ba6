"""What a diagnosis found."""

import json

import pytest
import torch
from torch import nn

from bnlab.health import Report, diagnose


@pytest.fixture
def report() -> Report:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()
    y = torch.arange(256) % 2
    x = torch.stack([y * 4.0 + 5 + 0.2 * torch.randn(256), torch.randn(256)], 1)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0, 0], [1, 0]]))
        model[1].bias.zero_()
    return diagnose(model, [*zip(x.split(32), y.split(32), strict=True)])


def test_findings_are_known_by_id_and_name(report: Report) -> None:
    assert "BN102" in report
    assert report["stale-statistics"] is report["BN102"]
    assert "BN999" not in report
    with pytest.raises(KeyError, match="BN999"):
        report["BN999"]


def test_findings_at_or_above_a_severity(report: Report) -> None:
    assert {f.severity for f in report.at_or_above("warn")} <= {"error", "warn"}
    assert report.at_or_above("info") == report.findings
    order = ["error", "warn", "info"]
    assert [f.severity for f in report.findings] == sorted((f.severity for f in report.findings), key=order.index)


def test_the_document_is_json(report: Report) -> None:
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["accuracy"] == {"running": 0.5, "batch": 1.0, "recalibrated": 1.0}
    assert document["images"] == 256
    assert "BN102" in [finding["id"] for finding in document["findings"]]


def test_it_prints_as_sentences_and_in_one_line(report: Report) -> None:
    text = str(report)
    assert text.startswith("accuracy by running, batch, population statistics: 50.0%, 100.0%, 100.0%") or (
        "accuracy by running, batch, recalibrated statistics: 50.0%, 100.0%, 100.0%" in text
    )
    assert repr(report).startswith("<Report on 256 images: ")
    assert "\n" not in repr(report)
