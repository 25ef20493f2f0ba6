"""The page of a diagnosis."""

import torch
from torch import nn

from bnlab.health import diagnose
from bnlab.report.health_page import accuracy_picture, diagnosis_page, layer_picture


def test_the_page_has_findings_with_pictures() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)).eval()
    x = torch.randn(96, 3) * 5 + 7
    report = diagnose(model, [*zip(x.split(32), (x.argmax(1)).split(32), strict=True)])
    page = diagnosis_page(report, "/home/me/net.py:make", "/home/me/photos", "val")
    assert "/home" not in page
    assert "Diagnosis of net.py:make" in page
    for finding in report.findings:
        assert f"{finding.id} {finding.name}" in page
    assert "96 images of photos (val)" in page
    assert page.count("<svg") >= 1
    assert "running mean" in layer_picture(report.evidence.layers["0"])


def test_without_labels_there_is_no_chart_of_accuracy() -> None:
    report = diagnose(nn.Sequential(nn.BatchNorm1d(3)).eval(), [torch.randn(8, 3)])
    assert accuracy_picture(report) == ""
    assert "Accuracy by statistics" not in diagnosis_page(report, "net", "photos", "all")
