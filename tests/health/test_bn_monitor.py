import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab import norm
from bnlab.health.bn_monitor import BNMonitor, recover
from bnlab.health.epoch import Health, LayerHealth
from bnlab.health.evidence import Scores
from bnlab.nets import build
from bnlab.nets.freeze import freeze
from bnlab.norm import BatchNorm1d, BatchNorm2d, NormActivation

Images = Callable[[], Tensor]


def monitored(network: nn.Module, images: Images, steps: int = 64, *, window: int = 8, every: int = 8) -> Health:
    """Forwards alone: the weights stay."""
    torch.manual_seed(0)
    monitor = BNMonitor(network, window=window, every=every)
    with torch.no_grad():
        for step in range(steps):
            with monitor.step(step):
                network(images())
    return monitor.report()


def row(network: nn.Module, images: Images, steps: int = 64, *, window: int = 8, every: int = 8) -> LayerHealth:
    (only,) = monitored(network, images, steps, window=window, every=every).layers
    return only


def codes(health: Health) -> list[str]:
    return [finding.id for finding in health.findings()]


def recovered(layer: nn.Module, batches: list[Tensor], momentum: float | None) -> tuple[Tensor, Tensor]:
    """The batches' means and unbiased variances from the running statistics: K x C each, float64."""
    statistics, rates = [torch.cat([layer.running_mean, layer.running_var])], []
    for batch in batches:
        layer(batch)
        statistics.append(torch.cat([layer.running_mean, layer.running_var]))
        rates.append([1 / int(layer.num_batches_tracked) if momentum is None else momentum])
    sizes = np.array([layer.num_features])
    found = recover(torch.stack(statistics).double().numpy(), np.array(rates), sizes)
    means, variances = torch.from_numpy(found).chunk(2, dim=1)
    return means, variances


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0, None])
def test_batch_statistics_are_recovered(momentum: float | None) -> None:
    torch.manual_seed(0)
    layer = BatchNorm2d(5, momentum=momentum).train()
    layer(torch.randn(8, 5, 4, 4) + 3)
    batches = [torch.randn(8, 5, 4, 4) * 2 + 3 for _ in range(8)]  # sigma 2, so means and variances are of that size
    means, variances = recovered(layer, batches, momentum)
    true = torch.stack([b.double().mean((0, 2, 3)) for b in batches])
    assert means.shape == (8, 5)
    assert (means - true).abs().max() < 1e-4 * 2
    true = torch.stack([b.double().var((0, 2, 3)) for b in batches])
    assert (variances - true).abs().max() < 1e-4 * 4


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.001])
def test_rounding_is_bounded(momentum: float) -> None:
    torch.manual_seed(0)
    layer = BatchNorm1d(16, momentum=momentum).train()
    layer.running_mean.fill_(50)
    batches = [torch.randn(64, 16) + 50 for _ in range(8)]
    means, _ = recovered(layer, batches, momentum)
    true = torch.stack([b.double().mean(0) for b in batches])
    assert (means - true).abs().max() < 2 * torch.finfo(torch.float32).eps * 51 / momentum


def test_channels_lost_in_rounding_are_left_out() -> None:
    far = torch.tensor([0.0] * 7 + [1e5])  # its batch means come in steps of 0.08 sigma
    layer = BatchNorm1d(8, momentum=0.1).train()
    layer.running_mean.copy_(far)
    layer.running_var[7] = 100.0
    assert row(layer, lambda: torch.randn(64, 8) + far).effective_batch == pytest.approx(64, rel=0.2)
    half = BatchNorm1d(8).bfloat16().train()
    half.running_mean.fill_(50)
    assert row(half, lambda: torch.randn(64, 8).bfloat16() + 50).effective_batch is None


@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
def test_effective_batch_counts_independent_values(momentum: float | None) -> None:
    """Images that are one value each count as images; independent pixels count as pixels."""
    layer = BatchNorm2d(16, momentum=momentum).train()
    constant = row(layer, lambda: torch.randn(16, 16, 1, 1).expand(-1, -1, 4, 4))
    assert constant.batches == 64
    assert constant.effective_batch == pytest.approx(16, rel=0.15)
    independent = row(layer, lambda: torch.randn(16, 16, 4, 4))
    assert independent.effective_batch == pytest.approx(256, rel=0.15)
    assert 256 * 0.8 < independent.effective_batch < independent.effective_batch_at_most < 256 * 1.5


def test_slow_drift_is_not_mistaken_for_small_batches() -> None:
    step = iter(range(1000))
    found = row(BatchNorm1d(16).train(), lambda: torch.randn(64, 16) + 0.02 * next(step))
    assert found.effective_batch == pytest.approx(64, rel=0.2)  # the plain variance would give 37


@pytest.mark.parametrize("momentum", [0.1, None])
def test_layers_that_move_more_than_once_a_step(momentum: float | None) -> None:
    layer = BatchNorm1d(16, momentum=momentum).train()
    torch.manual_seed(0)
    monitor = BNMonitor(layer, every=8)
    with norm.accumulate(layer, 4):
        for step in range(64):
            with monitor.step(step):
                for _ in range(4):
                    layer(torch.randn(32, 16))
    (found,) = monitor.report().layers
    assert found.batches == 64
    assert found.effective_batch == pytest.approx(32, rel=0.2)  # not 128


def test_distances_are_those_that_recalibration_measured() -> None:
    network = nn.Sequential(BatchNorm1d(32, momentum=1e-4), nn.Linear(32, 4), BatchNorm1d(4)).train()
    monitor = BNMonitor(network, every=8)
    torch.manual_seed(0)
    images = torch.randn(64, 32) * 2 + 0.5
    for step in range(8):
        with monitor.step(step):
            network(images)
    network[2].freeze()  # so that recalibration leaves it out
    recalibration = norm.recalibrate(network, [images])
    scores = Scores(running=np.repeat([1.0, 0.0], 50), population=np.ones(100))
    network[0].num_batches_tracked.fill_(8)  # training recalibrates a copy
    health = monitor.report(recalibration, scores)
    stale, frozen = health.layers
    measured = recalibration.layers["0"]
    assert measured.variance_off > 3
    assert (stale.mean_off, stale.variance_off, stale.off_share) == (measured.mean_off, measured.variance_off, 1)
    assert stale.initial == pytest.approx((1 - 1e-4) ** 8)
    assert (frozen.mean_off, frozen.variance_off, frozen.off_share) == (None, None, None)
    assert "BN102" in codes(health)
    (again, _) = monitor.report().layers
    assert (again.mean_off, again.off_share) == (None, None)


def test_small_batches_are_found() -> None:
    assert codes(monitored(BatchNorm2d(16).train(), lambda: torch.randn(8, 16, 1, 1).expand(-1, -1, 6, 6))) == ["BN103"]


@pytest.mark.parametrize(("steps", "expected"), [(7, []), (8, ["BN103"])])
def test_fewer_than_eight_batches_give_no_finding(steps: int, expected: list[str]) -> None:
    health = monitored(BatchNorm2d(64).train(), lambda: torch.randn(2, 64, 1, 1).expand(-1, -1, 6, 6), steps)
    assert health.layers[0].effective_batch < 8
    assert codes(health) == expected


@pytest.mark.parametrize("make", [nn.BatchNorm2d, BatchNorm2d])
def test_dead_channels_are_found_before_a_relu(make: Callable[[int], nn.BatchNorm2d]) -> None:
    layer = make(20).train()
    with torch.no_grad():
        layer.bias[:2] = -3.2
        layer.bias[2] = -3.0
        layer.weight[0] = -1
    images = lambda: torch.randn(64, 20, 1, 1)  # noqa: E731
    for after in (nn.LeakyReLU(), nn.Identity()):
        assert codes(monitored(nn.Sequential(layer, after), images, 8)) == []
    assert monitored(NormActivation(layer, nn.ReLU(), "before"), images, 8).layers[0].dead == 2
    assert monitored(NormActivation(layer, nn.ReLU(), "after"), images, 8).layers[0].dead == 0
    health = monitored(nn.Sequential(layer, nn.ReLU()), images, 8)
    assert health.layers[0].dead == 2
    assert codes(health) == ["BN109"]


def test_gammas_near_zero_are_found() -> None:
    layer = BatchNorm1d(10).train()
    with torch.no_grad():
        layer.weight[3] = -0.009
        layer.weight[4] = 0.011
    health = monitored(layer, lambda: torch.randn(64, 10), 8)
    assert health.layers[0].gamma_near_zero == 1
    assert codes(health) == ["BN110"]
    layer.requires_grad_(False)  # this training cannot change them
    assert codes(monitored(layer, lambda: torch.randn(64, 10), 8)) == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("steps", [8, 64])
def test_a_sound_network_has_no_findings(seed: int, steps: int) -> None:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 64, 3, bias=False), BatchNorm2d(64), nn.ReLU()).train()
    health = monitored(network, lambda: torch.randn(16, 3, 8, 8), steps)
    assert health.layers[0].batches == steps
    assert health.layers[0].effective_batch is not None
    assert codes(health) == []


def test_sampling_is_a_function_of_the_step() -> None:
    monitor = BNMonitor(BatchNorm1d(2), window=3, every=10)
    assert [step for step in range(25) if monitor.samples(step)] == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    layer = BatchNorm1d(4).train()
    assert row(layer, lambda: torch.randn(8, 4), steps=25, window=3, every=10).batches == 9
    assert row(layer, lambda: torch.randn(8, 4), steps=22, window=3, every=10).batches == 8  # a window cut short


@pytest.mark.parametrize("window", [1, 11])
def test_a_window_that_is_too_short_or_too_long_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"every=10, not {window}"):
        BNMonitor(BatchNorm1d(2), window=window, every=10)


def test_a_resumed_training_samples_the_same_from_the_next_window_on() -> None:
    batches = [torch.randn(8, 4) for _ in range(40)]
    reports = []
    for begin in (0, 15):
        layer = BatchNorm1d(4).train()
        monitor = BNMonitor(layer, window=4, every=20)
        for step, batch in enumerate(batches):
            if step == 15:
                monitor.report()
            if step >= begin:
                with monitor.step(step):
                    layer(batch)
            else:
                layer(batch)
        reports.append(monitor.report())
    assert reports[0] == reports[1]
    assert reports[0].layers[0].batches == 4


def test_after_a_report_a_new_window_begins() -> None:
    layer = BatchNorm1d(4).train()
    monitor = BNMonitor(layer, every=8)
    for step in range(12):
        with monitor.step(step):
            layer(torch.randn(8, 4))
        if step == 9:
            first = monitor.report()
            layer.running_mean.fill_(100)  # as an evaluation between might; no step moved it
    second = monitor.report()
    assert first.layers[0].batches == 10
    assert second.layers[0].batches == 2


def test_a_batch_that_is_not_finite_is_left_out() -> None:
    images = iter([torch.randn(8, 4)] * 9 + [torch.full((8, 4), torch.nan)] + [torch.randn(8, 4)] * 14)
    found = row(BatchNorm1d(4).train(), lambda: next(images), steps=24)
    assert found.batches == 16
    assert found.effective_batch is not None


def test_a_window_whose_count_is_reset_is_left_out() -> None:
    """A recalibration between two steps would reset it."""
    layer, step = BatchNorm1d(4).train(), iter(range(100))

    def images() -> Tensor:
        if next(step) == 11:
            layer.num_batches_tracked.fill_(0)
        return torch.randn(8, 4)

    assert row(layer, images, steps=24).batches == 16


@pytest.mark.parametrize("options", ["batch", "ghost:4", "frozen", "momentum 0", "population", "whitening:4", "none"])
def test_every_kind_of_network(options: str) -> None:
    kind = options if options in ("batch", "ghost:4", "whitening:4", "none") else "batch"
    momentum = 0.0 if options == "momentum 0" else 0.1
    network = build("bn_small_inception", classes=3, width=0.25, norm=kind, norm_momentum=momentum).train()
    if options == "frozen":
        freeze(network, "none", norms=True)
    if options == "population":
        for layer in network.modules():
            if isinstance(layer, norm.layers.BatchNorm):
                layer.statistics = "population"
    health = monitored(network, lambda: torch.randn(8, 3, 32, 32), steps=8)
    if options in ("none", "whitening:4"):
        assert health == Health()
        return
    assert len(health.layers) > 30
    moved = options in ("batch", "ghost:4")
    assert {r.batches for r in health.layers} == {8 * moved}
    assert all((r.effective_batch is not None) == moved for r in health.layers)


def weights_after_20_steps(*, with_monitor: bool) -> str:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    monitor = BNMonitor(network if with_monitor else nn.Identity(), window=4, every=8)
    for step in range(20):
        with monitor.step(step):
            loss = F.cross_entropy(network(torch.randn(8, 3, 8, 8)), torch.arange(8) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            assert [layer.batches for layer in monitor.report().layers] == ([6] if with_monitor else [])
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_training_gives_the_same_bits_with_and_without() -> None:
    assert weights_after_20_steps(with_monitor=True) == weights_after_20_steps(with_monitor=False)
