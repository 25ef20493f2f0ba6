"""Sound networks pass, and what is wrong with others is named."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnlab import nets
from bnlab.errors import UsageError
from bnlab.health import Report
from bnlab.testing import check_network

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def fresh() -> nn.Sequential:
    """Untrained, in evaluation mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 4)),
    ).eval()


class BuiltInForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d(8)(self.convolution(x)).mean((2, 3))  # type: ignore[no-any-return]


def test_a_fresh_network_passes() -> None:
    report = check_network(fresh(), IMAGES)
    assert isinstance(report, Report)
    assert report.images == 16
    assert not report.at_or_above("error")
    assert "BN020" not in report.skipped  # another memory format was tried
    assert all(finding.id < "BN100" for finding in report.findings)


def test_a_fresh_network_of_bnlab_passes() -> None:
    torch.manual_seed(0)
    assert check_network(nets.build("bn_small_inception", classes=4).eval(), IMAGES).images == 16


def spoiled(network: nn.Sequential, fault: str) -> nn.Module:
    layer = network[4]
    assert isinstance(layer, nn.BatchNorm2d)
    assert layer.running_var is not None
    if fault == "training":
        layer.train()
    elif fault == "not persistent":
        layer.register_buffer("running_mean", torch.ones(8), persistent=False)
        layer.register_buffer("running_var", torch.ones(8), persistent=False)
    elif fault == "nan":
        layer.running_var[3] = torch.nan
    return network


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("training", "error BN002 training-in-evaluation: 1 of 2 layers (4)"),
        ("not persistent", "error BN021 unsaved-statistics: "),
        ("nan", "error BN008 broken-statistics: "),
    ],
)
def test_faults_are_named(fault: str, words: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_network(spoiled(fresh(), fault), IMAGES)
    *lines, last = str(caught.value).splitlines()
    (line,) = [line for line in lines if words in line]
    assert line.startswith(words)
    number = words.split()[1]
    assert f"`bnlab doctor --explain {number}`" in last
    if fault != "nan":  # which other checks notice, too
        check_network(spoiled(fresh(), fault), IMAGES, ignore=[number])
    check_network(spoiled(fresh(), fault), IMAGES, select=["momentum-extreme"])


def test_what_fails_is_a_choice() -> None:
    network = BuiltInForward().eval()
    assert "BN022" in check_network(network, IMAGES)
    with pytest.raises(AssertionError, match=r"^warn BN022 hidden-normalisation: BatchNorm2d in the forward of"):
        check_network(network, IMAGES, fail_on="warn", select=["BN022"])
    check_network(network, IMAGES, fail_on="info", select=["BN008"])


def test_everything_is_restored() -> None:
    network = fresh().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    numbers = torch.get_rng_state()
    check_network(network, IMAGES)
    assert network.training
    assert all(before[name].equal(tensor) for name, tensor in network.state_dict().items())
    assert torch.get_rng_state().equal(numbers)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = fresh()

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"logits": self.network(pixels)}


@pytest.mark.parametrize("kind", ["pair", "mapping", "forward", "flat"])
def test_batches_of_any_kind(kind: str) -> None:
    model: nn.Module = fresh()
    batch: Any = (IMAGES, torch.arange(16) % 4)
    more: dict[str, Any] = {}
    if kind == "mapping":
        model, batch = Named().eval(), {"pixels": IMAGES, "labels": batch[1]}
    elif kind == "forward":
        batch = {"picture": IMAGES, "class": batch[1]}
        more = {"forward": lambda model, b: model(b["picture"]), "labels": lambda b: b["class"]}
    elif kind == "flat":
        model, batch = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).eval(), torch.randn(16, 5)
    report = check_network(model, batch, **more)
    assert report.images == 16
    assert (report.accuracy["running"] is None) == (kind == "flat")


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no severity 'eror': did you mean 'error'\?"):
        check_network(fresh(), IMAGES, fail_on="eror")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there is no check 'BN999'"):
        check_network(fresh(), IMAGES, select=["BN999"])


def test_a_network_that_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"must be the model, an nn\.Module, not str"):
        check_network("model", torch.randn(4, 3, 8, 8))  # type: ignore[arg-type]
