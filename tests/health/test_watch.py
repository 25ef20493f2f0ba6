import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab import health
from bnlab.errors import UsageError
from bnlab.health import Health


class Residual(nn.Module):
    """As people write them: a normalisation layer and a ReLU are attributes, and one ReLU serves twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv(x)))  # N x 8 x H x W
        x = self.relu(x + self.bn2(x))  # N x 8 x H x W: not what bn2 gives
        return self.head(x.mean((2, 3)))  # N x 2


def train(model: nn.Module, steps: int, size: int = 8, call: nn.Module | None = None) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model.train()
    for _ in range(steps):
        x = torch.randn(size, 3, 8, 8)
        F.cross_entropy((call or model)(x), torch.arange(size) % 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_callback_gets_what_each_layer_did() -> None:
    model, got = Residual(), []
    with health.watch(model, log=lambda step, found: got.append((step, found)), every=8, report_every=16):
        train(model, 40)
    assert [step for step, _ in got] == [16, 32, 40]
    last = got[0][1]
    assert [row.name for row in last.layers] == ["bn1", "bn2"]
    assert all(row.batches == 16 for row in last.layers)
    assert last.layers[0].effective_batch == pytest.approx(8 * 64, rel=0.5)  # the pixels are independent


def test_the_training_is_the_same_as_without() -> None:
    found = []
    for watched in (False, True):
        torch.manual_seed(1)
        model = Residual()
        if watched:
            with health.watch(model, every=4, window=4):
                train(model, 20)
        else:
            train(model, 20)
        assert not model._forward_pre_hooks
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        found.append((model.state_dict(), torch.get_rng_state()))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0].values(), found[1][0].values(), strict=True))
    assert torch.equal(found[0][1], found[1][1])


def test_dead_channels_are_those_before_a_relu() -> None:
    model = Residual()
    with torch.no_grad():
        model.bn1.bias[:3] = -9
        model.bn2.bias[:4] = -9  # the ReLU gets a sum
    with health.watch(model, every=8) as watched:
        train(model, 8)
    assert [row.dead for row in watched.health.layers] == [3, 0]
    assert [finding.id for finding in watched.findings] == ["BN109"]


def test_small_batches_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    with caplog.at_level(logging.WARNING, "bnlab"), health.watch(model, every=8, report_every=16) as watched:
        train(model, 48, size=4)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["BN103 small-effective-batch"]
    assert [finding.id for finding in watched.findings] == ["BN103"]


def test_layers_that_never_move_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16, momentum=0.0), nn.Linear(16, 2))
    with caplog.at_level(logging.WARNING, "bnlab"), health.watch(model, every=8, report_every=16):
        train(model, 48, size=4)
    assert [record.getMessage() for record in caplog.records] == [
        "nothing was measured of the normalisation layers, since no running statistics moved in the 16 steps that were "
        "sampled: the layers are frozen, in evaluation mode, or have the momentum 0"
    ]


def test_the_loop_may_call_parts_of_the_model_alone() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Residual()

    model = Module()
    with health.watch(model, every=8) as watched:
        train(model, 16, call=model.network)
    assert watched.steps == 16
    assert all(row.batches == 16 for row in watched.health.layers)


def test_evaluation_in_between_is_no_step() -> None:
    model = Residual()
    with health.watch(model, every=8) as watched:
        train(model, 4)
        model.eval()
        model(torch.randn(8, 3, 8, 8))
        train(model, 4)
    assert watched.steps == 8
    assert all(row.batches == 8 for row in watched.health.layers)


def test_both_updates_of_a_checkpointed_forward_are_counted() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    model = Checkpointed()
    with health.watch(model, every=8) as watched:
        train(model, 16)
    assert [row.updates for row in watched.health.layers] == [32, 32]
    assert all(row.batches == 16 for row in watched.health.layers)


def test_an_error_in_the_loop_passes_and_leaves_no_hooks() -> None:
    model = Residual()
    with pytest.raises(KeyError, match="mine"), health.watch(model) as watched:
        train(model, 2)
        raise KeyError("mine")
    assert watched.health is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_tensorboard_gets_totals_and_findings(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = Residual()
    with SummaryWriter(str(tmp_path)) as writer, health.watch(model, log=writer, every=8):
        train(model, 8)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [one.step for one in events.Scalars("norm/effective_batch_smallest")] == [8]
    assert "norm_dead/bn1" in events.Tags()["scalars"]


def test_without_layers_there_is_nothing_to_report() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with health.watch(model) as watched:
        train(model, 2)
    assert watched.health == Health()


def test_it_can_be_entered_again() -> None:
    model = Residual()
    watched = health.watch(model, every=8)
    for _ in range(2):
        with watched:
            train(model, 8)
    assert watched.steps == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"window": 1}, "window must"), ({"report_every": 0}, "report_every=0"), ({"window": 9, "every": 8}, "window")],
)
def test_numbers_out_of_range(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        health.watch(Residual(), **settings)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="an nn"):
        health.watch([Residual()])  # type: ignore[arg-type]
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(2)))
    with pytest.raises(UsageError, match="scripted"):
        health.watch(scripted)


def test_a_forward_that_calls_the_model_again_is_one_step() -> None:
    """As under Lightning's distributed strategies, where training_step runs as the module's forward and calls it."""

    class Twice(Residual):
        def forward(self, x: Tensor, inner: bool = False) -> Tensor:
            return super().forward(x) if inner else self(x, inner=True)

    model = Twice()
    with health.watch(model, every=8) as watched:
        train(model, 16)
    assert watched.steps == 16
    assert all(row.batches == 16 for row in watched.health.layers)


def test_the_model_may_be_copied_and_saved_meanwhile(tmp_path: Path) -> None:
    model = Residual()
    with health.watch(model, every=8) as watched:
        for steps in (0, 3, 20):  # before the first, within a window, and outside
            train(model, steps)
            counted = watched.steps
            for copied in (copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)):
                copied.train()(torch.randn(8, 3, 8, 8))
            torch.save(model, tmp_path / "model.pt")
            torch.load(tmp_path / "model.pt", weights_only=False).train()(torch.randn(8, 3, 8, 8))
            assert watched.steps == counted == {0: 0, 3: 3, 20: 23}[steps]
