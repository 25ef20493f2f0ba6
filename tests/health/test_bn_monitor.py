import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab import norm
from bnlab.health.bn_monitor import BNMonitor, _rates, recover
from bnlab.health.findings import Health, LayerHealth
from bnlab.nets import build
from bnlab.nets.freeze import freeze
from bnlab.norm import BatchNorm1d, BatchNorm2d, NormActivation

SETTLED = 1000  # batches: long past warm-up
Images = Callable[[], Tensor]


def settled(layer: nn.Module) -> nn.Module:
    layer.num_batches_tracked.fill_(SETTLED)
    return layer.train()


def watched(network: nn.Module, images: Images, steps: int = 64, *, window: int = 8, every: int = 8) -> Health:
    """Forwards alone: the weights stay."""
    torch.manual_seed(0)
    watch = BNMonitor(network, window=window, every=every)
    with torch.no_grad():
        for step in range(steps):
            watch.before(step)
            network(images())
            watch.after(step)
    return watch.report()


def row(network: nn.Module, images: Images, steps: int = 64, *, window: int = 8, every: int = 8) -> LayerHealth:
    (only,) = watched(network, images, steps, window=window, every=every).layers
    return only


def recovered(watch: BNMonitor, layer: nn.Module, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The batches' means and unbiased variances as the watch has them: K x C each."""
    taken: list[Tensor] = []
    real = watch._take

    def take(run, statistics, counts):  # type: ignore[no-untyped-def]
        rate, _ = _rates(run, counts[1:] - counts[:-1], counts[1:])
        taken.append(torch.from_numpy(recover(statistics, rate, watch._sizes)))
        real(run, statistics, counts)

    watch._take = take  # type: ignore[method-assign]
    for step, batch in enumerate(batches):
        watch.before(step)
        layer(batch)
        watch.after(step)
    watch.report()
    means, variances = taken[0].chunk(2, dim=1)
    return means, variances


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0, None])
def test_batch_statistics_are_recovered(momentum: float | None) -> None:
    torch.manual_seed(0)
    layer = BatchNorm2d(5, momentum=momentum).train()
    layer(torch.randn(8, 5, 4, 4) + 3)
    batches = [torch.randn(8, 5, 4, 4) * 2 + 3 for _ in range(8)]  # sigma 2, so means and variances are of that size
    means, variances = recovered(BNMonitor(layer), layer, batches)
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
    means, _ = recovered(BNMonitor(layer), layer, batches)
    true = torch.stack([b.double().mean(0) for b in batches])
    assert (means - true).abs().max() < 2 * torch.finfo(torch.float32).eps * 51 / momentum


def test_channels_lost_in_rounding_are_left_out() -> None:
    far = torch.tensor([0.0] * 7 + [1e5])  # its batch means come in steps of 0.08 sigma
    layer = settled(BatchNorm1d(8, momentum=0.1))
    layer.running_mean.copy_(far)
    layer.running_var[7] = 100.0
    found = row(layer, lambda: torch.randn(64, 8) + far)
    assert found.off_share == 0
    assert found.effective_batch == pytest.approx(64, rel=0.2)
    half = settled(BatchNorm1d(8).bfloat16())
    half.running_mean.fill_(50)
    assert row(half, lambda: torch.randn(64, 8).bfloat16() + 50).effective_batch is None


@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
def test_effective_batch_counts_independent_values(momentum: float | None) -> None:
    """Images that are one value each count as images; independent pixels count as pixels."""
    constant = row(settled(BatchNorm2d(16, momentum=momentum)), lambda: torch.randn(16, 16, 1, 1).expand(-1, -1, 4, 4))
    assert constant.batches == 64
    assert constant.effective_batch == pytest.approx(16, rel=0.15)
    independent = row(settled(BatchNorm2d(16, momentum=momentum)), lambda: torch.randn(16, 16, 4, 4))
    assert independent.effective_batch == pytest.approx(256, rel=0.15)
    assert 256 * 0.8 < independent.effective_batch < independent.effective_batch_at_most < 256 * 1.5


def test_slow_drift_does_not_pass_for_small_batches() -> None:
    place = iter(range(1000))
    found = row(settled(BatchNorm1d(16)), lambda: torch.randn(64, 16) + 0.02 * next(place))
    assert found.effective_batch == pytest.approx(64, rel=0.2)  # the plain variance would say 37


@pytest.mark.parametrize("momentum", [0.1, None])
def test_layers_moved_more_than_once_a_step(momentum: float | None) -> None:
    layer = settled(BatchNorm1d(16, momentum=momentum))
    torch.manual_seed(0)
    watch = BNMonitor(layer, every=8)
    with norm.accumulate(layer, 4):
        for step in range(64):
            watch.before(step)
            for _ in range(4):
                layer(torch.randn(32, 16))
            watch.after(step)
    (found,) = watch.report().layers
    assert found.batches == 64
    assert found.effective_batch == pytest.approx(32, rel=0.2)  # not 128
    assert found.off_share == 0


def test_stale_statistics_are_found() -> None:
    stale = settled(BatchNorm1d(32, momentum=1e-4))
    health = watched(nn.Sequential(stale), lambda: torch.randn(64, 32) * 2 + 0.5)
    (found,) = health.layers
    assert found.off_share == 1
    assert found.mean_off == pytest.approx(0.25, abs=0.06)
    assert found.variance_off == pytest.approx(4, rel=0.1)
    (warning,) = health.warnings()
    assert warning.startswith("BN102: the running statistics of 1 of 1 layer are")
    assert "90% of the values they began with, for norm_momentum 0.0001" in warning
    assert {"norm_mean_off_worst", "norm_off_share", "norm_effective_batch_smallest"} <= set(health.scalars())


def test_moving_inputs_are_the_learning_rate() -> None:
    place = iter(range(1000))
    health = watched(settled(BatchNorm1d(16)), lambda: torch.randn(64, 16) + 0.05 * next(place))
    (warning,) = health.warnings()
    assert warning.startswith("BN102")
    assert warning.endswith("lower learning_rate or raise norm_momentum")


def test_warm_up_is_not_judged() -> None:
    found = row(BatchNorm1d(32).train(), lambda: torch.randn(64, 32) + 3, steps=16)
    assert found.batches == 16
    assert found.off_share is None
    assert found.initial == pytest.approx(0.9**8)


def test_small_batches_are_found() -> None:
    health = watched(settled(BatchNorm2d(16)), lambda: torch.randn(8, 16, 1, 1).expand(-1, -1, 6, 6))
    (warning,) = health.warnings()
    assert warning.startswith("BN103: a batch is worth fewer than 32 independent values to 1 of 1 layer")
    assert "raise batch_size" in warning


def test_a_handful_of_batches_is_no_finding() -> None:
    for steps, count in ((7, 0), (8, 1)):
        health = watched(settled(BatchNorm2d(64)), lambda: torch.randn(2, 64, 1, 1).expand(-1, -1, 6, 6), steps)
        assert health.layers[0].effective_batch < 8
        assert sum("BN103" in w for w in health.warnings()) == count


@pytest.mark.parametrize("make", [nn.BatchNorm2d, BatchNorm2d])
def test_dead_channels_are_found(make: Callable[[int], nn.BatchNorm2d]) -> None:
    layer = settled(make(20))
    with torch.no_grad():
        layer.bias[:2] = -3.2
        layer.bias[2] = -3.0
        layer.weight[0] = -1
    images = lambda: torch.randn(64, 20, 1, 1)  # noqa: E731
    for after in (nn.LeakyReLU(), nn.Identity()):
        assert watched(nn.Sequential(layer, after), images).warnings() == []
    assert watched(NormActivation(layer, nn.ReLU(), "before"), images).layers[0].dead == 2
    assert watched(NormActivation(layer, nn.ReLU(), "after"), images).layers[0].dead == 0
    settled(layer).reset_running_stats()
    settled(layer)
    health = watched(nn.Sequential(layer, nn.ReLU()), images)
    (warning,) = health.warnings()
    assert warning.startswith("BN109: dead channels")
    assert "in 1 of 1 layer, 2 in all. Worst 0: 2 of 20" in warning
    assert health.scalars()["norm_dead_share"] == 0.1
    with torch.no_grad():
        layer.bias[1] = 0  # 1 of 20 is 5%, and the gate is more
    assert watched(nn.Sequential(layer, nn.ReLU()), images).warnings() == []


def test_gammas_near_zero_are_found() -> None:
    layer = settled(BatchNorm1d(10))
    with torch.no_grad():
        layer.weight[3] = -0.009
        layer.weight[4] = 0.011
    health = watched(layer, lambda: torch.randn(64, 10))
    (warning,) = health.warnings()
    assert warning.startswith("BN110")
    assert "1 of 10" in warning
    layer.requires_grad_(False)  # nothing that this training could mend
    assert watched(layer, lambda: torch.randn(64, 10)).warnings() == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("steps", [8, 64])
def test_a_sound_network_is_silent(seed: int, steps: int) -> None:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 64, 3, bias=False), settled(BatchNorm2d(64)), nn.ReLU())
    with torch.no_grad():
        for _ in range(60):
            network(torch.randn(16, 3, 8, 8))
    health = watched(network, lambda: torch.randn(16, 3, 8, 8), steps)
    assert health.layers[0].batches == steps
    assert health.layers[0].off_share is not None
    assert health.warnings() == []


def test_sampling_is_a_function_of_the_step() -> None:
    watch = BNMonitor(BatchNorm1d(2), window=3, every=10)
    assert [step for step in range(25) if watch.samples(step)] == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    layer = BatchNorm1d(4).train()
    assert row(layer, lambda: torch.randn(8, 4), steps=25, window=3, every=10).batches == 9
    assert row(layer, lambda: torch.randn(8, 4), steps=22, window=3, every=10).batches == 8  # a run cut short
    for window in (1, 11):
        with pytest.raises(ValueError, match="window is 2 steps or more, and at most every=10"):
            BNMonitor(layer, window=window, every=10)


def test_a_resumed_training_watches_alike() -> None:
    """From the next run on: the one that was cut is taken in two parts."""
    batches = [torch.randn(8, 4) for _ in range(40)]
    reports = []
    for begin in (0, 15):
        layer = BatchNorm1d(4).train()
        watch = BNMonitor(layer, window=4, every=20)
        for step, batch in enumerate(batches):
            if step == 15:
                watch.report()
            if step >= begin:
                watch.before(step)
            layer(batch)
            if step >= begin:
                watch.after(step)
        reports.append(watch.report())
    assert reports[0] == reports[1]
    assert reports[0].layers[0].batches == 4


def test_a_report_begins_anew() -> None:
    layer = settled(BatchNorm1d(4))
    watch = BNMonitor(layer, every=8)
    for step in range(12):
        watch.before(step)
        layer(torch.randn(8, 4))
        watch.after(step)
        if step == 9:
            first = watch.report()
            layer.running_mean.fill_(100)  # as an evaluation between might; no step moved it
    second = watch.report()
    assert first.layers[0].batches == 10
    assert second.layers[0].batches == 2


def test_a_batch_that_is_not_finite_is_left_out() -> None:
    images = iter([torch.randn(8, 4)] * 9 + [torch.full((8, 4), torch.nan)] + [torch.randn(8, 4)] * 14)
    found = row(settled(BatchNorm1d(4)), lambda: next(images), steps=24)
    assert found.batches == 16
    assert found.effective_batch is not None


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
    health = watched(network, lambda: torch.randn(8, 3, 32, 32), steps=8)
    if options in ("none", "whitening:4"):
        assert health == Health()
        assert health.scalars() == {}
        assert health.warnings() == []
        return
    assert len(health.layers) > 30
    moved = options in ("batch", "ghost:4")
    assert {r.batches for r in health.layers} == {8 * moved}
    assert all((r.effective_batch is not None) == moved for r in health.layers)
    assert not [w for w in health.warnings() if "BN102" in w]


def weights_after_20_steps(watch_it: bool) -> str:
    torch.manual_seed(0)
    network = build("bn_small_inception", classes=3, width=0.25).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    watch = BNMonitor(network, window=4, every=8) if watch_it else None
    for step in range(20):
        if watch:
            watch.before(step)
        loss = F.cross_entropy(network(torch.randn(8, 3, 32, 32)), torch.arange(8) % 3)
        if watch:
            watch.after(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if watch and step % 10 == 9:
            assert watch.report().layers[0].batches
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_training_has_the_same_bits_with_and_without() -> None:
    assert weights_after_20_steps(True) == weights_after_20_steps(False)


def test_a_count_that_is_set_back_is_no_move() -> None:
    """As a recalibration between two steps of a run would; it leaves out that run, and no other."""
    layer, step = settled(BatchNorm1d(4)), iter(range(100))

    def images() -> Tensor:
        if next(step) == 11:
            layer.num_batches_tracked.fill_(500)
        return torch.randn(8, 4)

    assert row(layer, images, steps=24).batches == 16
