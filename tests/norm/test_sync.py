"""Two processes against one that has the batches of both; gloo, on the CPU."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bnlab.norm import BatchNorm2d, SyncBatchNorm, TooFewValuesError, convert_sync, freeze, recalibrate, revert_sync
from tests.norm.subclasses import Activated, AnyShape, Direct, Doubled, Synchronised
from tests.two_processes import run_scenes

Found = dict[str, Any]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), BatchNorm2d(4)),
        *(nn.Flatten(), nn.Linear(4 * 9, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 2)),
    )


def batch(count: int = 32, offset: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 3, 9, 9, generator=generator)
    return x * torch.linspace(0.5, 2, count)[:, None, None, None] + offset


def learn(model: nn.Module, x: Tensor, total: int) -> Found:
    """A step's output, gradients and statistics, of a loss that is a mean over all processes' `total` examples."""
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel() // max(len(y), 1))
    loss = ((y.flatten(1) * weights).sum(1).square().sum() if len(y) else y.sum()) / total
    loss.backward()
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return {
        "y": y.detach(),
        "dx": x.grad,
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters()},
        "statistics": {name: b.clone() for name, b in model.named_buffers()},
    }


def both(rank: int, sizes: tuple[int, int], channels_last: bool = False) -> Found:
    x = batch(sum(sizes)).split(sizes)[rank]
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    return learn(convert_sync(network()).model, x, sum(sizes))


def subclasses() -> nn.Sequential:
    """Layers with a forward of another library, one with an average of all batches."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), Activated(8, momentum=None), nn.Conv2d(8, 4, 3), Doubled(4), Synchronised(4)),
        *(nn.Conv2d(4, 4, 1), Activated(4, track_running_stats=False), nn.Conv2d(4, 4, 1), Direct(4, affine=False)),
        *(AnyShape(4), nn.Flatten(), nn.Linear(100, 2)),
    )


def both_of_subclasses(rank: int, sizes: tuple[int, int]) -> Found:
    model = subclasses()
    done = convert_sync(model)
    assert len(done.converted) == 6 and not done.kept
    return learn(model, batch(sum(sizes)).split(sizes)[rank], sum(sizes))


def reverted(rank: int) -> Found:
    """Of a layer that torch has synchronised, which refuses the CPU, each process by itself."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    revert_sync(model)
    return learn(DistributedDataParallel(model), batch(16), 16)


def all_empty(rank: int) -> Found:
    return learn(convert_sync(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Activated(4))).model, batch(0), 1)


def checkpointed(rank: int) -> Found:
    model = convert_sync(network()).model
    inner = model[:5]

    def forward(x: Tensor) -> Tensor:
        return model[5:](checkpoint(inner, x, use_reentrant=False))

    model.forward = forward  # type: ignore[method-assign]
    return learn(model, batch().split(16)[rank], 32)


def frozen_under_ddp(rank: int) -> Found:
    model = network()
    freeze(model)
    parallel = DistributedDataParallel(model).train()
    parallel(batch().split(16)[rank]).square().mean().backward()
    refused = False
    try:
        freeze(parallel)
    except ValueError:
        refused = True
    return {"refused": refused, "gradient": model[0].weight.grad, "statistics": dict(model.named_buffers())}


def averaged(rank: int) -> Found:
    """As in training: with DistributedDataParallel, each process computes its mean loss."""
    model = DistributedDataParallel(convert_sync(network()).model)
    y = model(batch().split(16)[rank])
    F.cross_entropy(y, torch.arange(32).split(16)[rank] % 2).backward()
    return {name: p.grad.clone() for name, p in model.module.named_parameters()}


def rectified(rank: int) -> Found:
    return learn(RectifiedPair(), batch().split((20, 12))[rank], 32)


class RectifiedPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = SyncBatchNorm(3)
        with torch.no_grad():
            self.bn.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x, relu=True)


def coarse(rank: int) -> Tensor:
    """bfloat16 without parameters, where the statistics have to be float32 nevertheless."""
    return SyncBatchNorm(3, affine=False)((batch() + 10).split(16)[rank].bfloat16())


def one_value(rank: int) -> str:
    try:
        SyncBatchNorm(3)(torch.zeros(1 - rank, 3, 1, 1))
    except TooFewValuesError as error:
        return str(error)
    return "no error"


def one_each(rank: int) -> Tensor:
    return SyncBatchNorm(3)(torch.full((1, 3), float(rank)))


def not_finite(rank: int) -> Found:
    bn = SyncBatchNorm(3)
    bn(torch.full((4, 3), torch.inf if rank else 1.0))
    return dict(bn.named_buffers())


def inference(rank: int) -> Tensor:
    model = convert_sync(network()).model.eval()
    return model(batch(4)) if rank == 0 else torch.zeros(0)  # the other process makes no call


def measured(rank: int, by_layer: bool) -> Found:
    """The first process has three batches, the second one."""
    model = DistributedDataParallel(convert_sync(network()).model)
    done = recalibrate(model, batch().split((8, 8, 8, 8))[slice(0, 3) if rank == 0 else slice(3, 4)],
                       layer_by_layer=by_layer)  # fmt: skip
    return {
        "images": done.images,
        "batches": done.batches,
        "passes": done.passes,
        **{name: b.clone() for name, b in model.module.named_buffers()},
    }


def measured_as_paper(rank: int) -> Found:
    model = network()
    recalibrate(model, batch().split(8)[slice(0, 3) if rank == 0 else slice(3, 4)], as_paper=True)
    return dict(model.named_buffers())


def failing(rank: int) -> str:
    def batches() -> Any:
        yield batch(8)
        if rank:
            raise OSError("no such photo")

    try:
        recalibrate(network(), batches())
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


SCENES: dict[str, Callable[[int], Any]] = {
    "even": lambda rank: both(rank, (16, 16)),
    "channels last": lambda rank: both(rank, (16, 16), True),
    "uneven": lambda rank: both(rank, (27, 5)),
    "empty": lambda rank: both(rank, (32, 0)),
    "subclasses": lambda rank: both_of_subclasses(rank, (16, 16)),
    "subclasses, uneven": lambda rank: both_of_subclasses(rank, (32, 0)),
    "reverted": reverted,
    "all empty": all_empty,
    "checkpointed": checkpointed,
    "frozen": frozen_under_ddp,
    "averaged": averaged,
    "rectified": rectified,
    "coarse": coarse,
    "one value": one_value,
    "one each": one_each,
    "not finite": not_finite,
    "inference": inference,
    "measured": lambda rank: measured(rank, False),
    "measured by layer": lambda rank: measured(rank, True),
    "measured as paper": measured_as_paper,
    "failing": failing,
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    """What each of two processes found in each scene."""
    return run_scenes(__name__, Path(tmp_path_factory.mktemp("processes")))


def assert_close(found: Tensor, expected: Tensor, what: str = "") -> None:
    error = (found - expected).abs().max() if expected.numel() else torch.zeros(())
    scale = expected.abs().max().clamp(min=1) if expected.numel() else 1
    assert error / scale < 3e-6, f"{what}: {error}"


@pytest.mark.parametrize(
    ("scene", "make"),
    [
        *((scene, network) for scene in ("even", "channels last", "uneven", "empty", "checkpointed")),
        *((scene, subclasses) for scene in ("subclasses", "subclasses, uneven")),
    ],
)
def test_two_processes_compute_what_one_does(scenes: tuple[Found, Found], scene: str, make: Any) -> None:
    first, second = (process[scene] for process in scenes)
    one = learn(make(), batch(), 32)
    assert_close(torch.cat([first["y"], second["y"]]), one["y"], "outputs")
    assert_close(torch.cat([first["dx"], second["dx"]]), one["dx"], "input gradients")
    for name, gradient in one["gradients"].items():
        assert_close(first["gradients"][name] + second["gradients"][name], gradient, name)
    for name, value in one["statistics"].items():
        assert_close(first["statistics"][name], value, name)
        assert torch.equal(first["statistics"][name], second["statistics"][name])


def test_under_distributed_data_parallel(scenes: tuple[Found, Found]) -> None:
    model = network()
    F.cross_entropy(model(batch()), torch.arange(32) % 2).backward()
    for process in scenes:
        for name, parameter in model.named_parameters():
            assert_close(process["averaged"][name], parameter.grad, name)


def test_layers_that_torch_has_synchronised_run_on_cpus_again(scenes: tuple[Found, Found]) -> None:
    one = learn(network(), batch(16), 16)
    for process in scenes:
        assert_close(process["reverted"]["y"], one["y"])


def test_batches_that_are_empty_in_all_processes(scenes: tuple[Found, Found]) -> None:
    one = learn(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Activated(4)), batch(0), 1)
    for process in scenes:
        found = process["all empty"]
        assert found["y"].shape == one["y"].shape == (0, 4, 9, 9)
        assert all(not gradient.any() for gradient in found["gradients"].values())
        for name, value in one["statistics"].items():
            assert torch.equal(found["statistics"][name], value)
        assert found["statistics"]["1.num_batches_tracked"] == found["statistics"]["2.num_batches_tracked"] == 1


def test_frozen_layers_under_distributed_data_parallel(scenes: tuple[Found, Found]) -> None:
    one = network()
    freeze(one)
    one.train()(batch()).square().mean().backward()
    for process in scenes:
        assert process["frozen"]["refused"]  # DistributedDataParallel would wait for gamma and beta
        assert_close(process["frozen"]["gradient"], one[0].weight.grad)
        for name, buffer in one.named_buffers():
            assert torch.equal(process["frozen"]["statistics"][name], buffer)


def test_with_relu(scenes: tuple[Found, Found]) -> None:
    first, second = (process["rectified"] for process in scenes)
    one = learn(RectifiedPair(), batch(), 32)
    assert one["y"].min() == 0
    assert_close(torch.cat([first["y"], second["y"]]), one["y"])
    assert_close(torch.cat([first["dx"], second["dx"]]), one["dx"])


def test_statistics_are_float32_at_least(scenes: tuple[Found, Found]) -> None:
    x = (batch() + 10).bfloat16().double()
    expected = nn.BatchNorm2d(3, affine=False).double()(x)
    found = torch.cat([process["coarse"] for process in scenes])
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 2e-2


def test_one_value_in_all_processes_is_refused_in_each(scenes: tuple[Found, Found]) -> None:
    for process in scenes:
        assert re.match(
            r"Expected more than 1 value per channel when training, got 1 in all processes at SyncBatchNorm: ",
            process["one value"],
        )
    torch.testing.assert_close(scenes[1]["one each"], torch.ones(1, 3), atol=1e-4, rtol=0)  # 0 and 1: mean 1/2, std 1/2


def test_a_batch_that_is_not_finite_in_one_process_moves_the_statistics_of_none(scenes: tuple[Found, Found]) -> None:
    for process in scenes:
        assert process["not finite"]["running_mean"].tolist() == [0, 0, 0]
        assert process["not finite"]["running_var"].tolist() == [1, 1, 1]
        assert process["not finite"]["num_batches_tracked"] == 0


def test_inference_needs_no_other_process(scenes: tuple[Found, Found]) -> None:
    assert torch.equal(scenes[0]["inference"], network().eval()(batch(4)))


@pytest.mark.parametrize(("scene", "by_layer"), [("measured", False), ("measured by layer", True)])
def test_all_processes_measure_the_same_statistics(scenes: tuple[Found, Found], scene: str, by_layer: bool) -> None:
    one = network()
    done = recalibrate(one, batch().split(8), layer_by_layer=by_layer)
    for process in scenes:
        found = process[scene]
        assert (found["images"], found["batches"], found["passes"]) == (32, 4, done.passes)
        for name, value in one.named_buffers():
            assert_close(found[name], value, name)
            assert torch.equal(found[name], scenes[0][scene][name])


def test_all_processes_measure_as_the_paper_does(scenes: tuple[Found, Found]) -> None:
    one = network()
    recalibrate(one, batch().split(8), as_paper=True)
    for process in scenes:
        for name, value in one.named_buffers():
            assert_close(process["measured as paper"][name], value, name)


def test_a_failure_in_one_process_fails_in_all(scenes: tuple[Found, Found]) -> None:
    assert scenes[0]["failing"] == "RuntimeError: recalibration failed in another process, whose message says why"
    assert scenes[1]["failing"] == "OSError: no such photo"


def test_alone_it_is_plain_batch_normalisation() -> None:
    one, other = learn(network(), batch(), 32), learn(convert_sync(network()).model, batch(), 32)
    assert torch.equal(one["y"], other["y"]) and torch.equal(one["dx"], other["dx"])
    with pytest.raises(ValueError, match=r"^expected at least 2D input \(got 1D input\) at SyncBatchNorm$"):
        SyncBatchNorm(3)(torch.zeros(3))
