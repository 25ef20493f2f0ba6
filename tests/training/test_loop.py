import os
import signal
import threading
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bnlab
from bnlab.__main__ import main
from bnlab.data.preprocess import normalise
from bnlab.nets import build
from bnlab.nets.build import move_network
from bnlab.nets.network import TableNetwork
from bnlab.recipe import Recipe
from bnlab.training import loop
from bnlab.training.build import TrainingContext, preprocessing_of
from bnlab.training.loop import batches_of_step, deterministic, loss_of, stop_requests, train_step
from bnlab.training.mixup import Targets
from bnlab.training.optimizer import make_optimizer, set_learning_rate
from bnlab.training.state import LossNotFiniteError
from tests.conftest import QUICK

CLASSES = torch.tensor([0, 1, 2, 0])


def test_auxiliary_losses_are_weighted() -> None:
    torch.manual_seed(0)
    outputs = tuple(torch.randn(4, 3) for _ in range(3))
    main, first, second = (F.cross_entropy(o, CLASSES) for o in outputs)
    recipe = Recipe(label_smoothing=0, auxiliary_weight=0.3)
    torch.testing.assert_close(loss_of(outputs, Targets(CLASSES), recipe), main + 0.3 * first + 0.3 * second)
    torch.testing.assert_close(loss_of(outputs[0], Targets(CLASSES), recipe), main)


def test_the_loss_of_mixed_photos_is_that_of_soft_targets() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    other = torch.tensor([2, 2, 0, 1])
    soft = 0.3 * F.one_hot(CLASSES, 3) + 0.7 * F.one_hot(other, 3)
    found = loss_of(logits, Targets(CLASSES, other, 0.3), Recipe(label_smoothing=0.1))
    torch.testing.assert_close(found, F.cross_entropy(logits, soft.float(), label_smoothing=0.1))


def context_of(network: TableNetwork, recipe: Recipe) -> TrainingContext:
    """A context for train_step, without photos."""
    return TrainingContext(
        dataset=None,  # type: ignore[arg-type]
        network=network,
        optimizer=make_optimizer(network, recipe),
        ema=None,
        loader=None,  # type: ignore[arg-type]
        recipe=recipe,
        preprocessing=preprocessing_of(recipe),
        device="cpu",
        forward=network,
    )


def batches_of(number: int, size: int, batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images that differ as much as possible: similar ones give channels of almost no variance, and large rounding."""
    random = np.random.default_rng(0)
    blocks = [random.integers(0, 256, (batch, 8, 8, 3), dtype=np.uint8) for _ in range(number)]
    large = [block.repeat(size // 8, 1).repeat(size // 8, 2) for block in blocks]
    return [(pixels, random.integers(0, 3, batch)) for pixels in large]


@pytest.mark.parametrize(
    ("network", "dtype", "steps", "tolerance"),
    [
        ("bn_small_inception", torch.float32, 12, 1e-4),
        ("bn_small_inception", torch.float64, 12, 1e-9),
        pytest.param("bn_googlenet", torch.float64, 5, 1e-8, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_losses_are_those_of_plain_pytorch(
    network: str, dtype: torch.dtype, steps: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step against the same step written in the ordinary way: contiguous tensors, torch's layers, all tensors kept.

    Channels-last kernels add in another order, and each step of a new GoogLeNet makes a difference 20 times as large,
    whatever the learning rate: 1e-16 becomes 1e-4 after ten steps. So it is compared in float64, over few steps.
    """
    rate, size = 1e-4, 64 if network == "bn_googlenet" else 32
    heads = network == "bn_googlenet"
    recipe = Recipe(network=network, size=size, precision="float32", auxiliary=heads)
    options = {"classes": 3, "auxiliary": heads, "dropout": 0.2}
    ours = move_network(build(network, **options), "cpu").train().to(dtype)  # type: ignore[arg-type]
    plain = build(network, norm=nn.BatchNorm2d, **options).train().to(dtype)  # type: ignore[arg-type]
    plain.load_state_dict(ours.state_dict())
    monkeypatch.setattr(loop, "normalise", lambda images, preprocessing: normalise(images, preprocessing).to(dtype))
    context = context_of(ours, recipe)
    decayed = [p for p in plain.parameters() if p.ndim > 1]
    rest = [p for p in plain.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
    found, expected = [], []
    for step, (pixels, labels) in enumerate(batches_of(steps, size, 8)):
        set_learning_rate(context.optimizer, rate)
        found.append(train_step(context, pixels, labels, step)[0].item())

        torch.manual_seed(step)
        images = normalise(torch.from_numpy(pixels), preprocessing_of(recipe)).to(dtype).contiguous()
        outputs = plain(images)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        losses = [F.cross_entropy(o, torch.from_numpy(labels), label_smoothing=0.1) for o in outputs]
        loss = losses[0] + 0.3 * sum(losses[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert found == pytest.approx(expected, rel=tolerance)
    assert len(set(found)) == steps


def test_a_step_in_bfloat16_is_near_one_in_float32() -> None:
    pixels, labels = batches_of(1, 32, 16)[0]
    losses = {}
    for precision in ("float32", "bfloat16"):
        recipe = Recipe.model_validate({"network": "bn_small_inception", "size": 32, "precision": precision})
        network = move_network(build(recipe.network, classes=3, dropout=0.0), "cpu").train()
        losses[precision] = train_step(context_of(network, recipe), pixels, labels, 0)[0].item()
        assert all(p.dtype == torch.float32 for p in network.parameters())
        assert all(b.dtype != torch.bfloat16 for b in network.buffers())
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)
    assert losses["bfloat16"] != losses["float32"]


def test_a_loss_that_is_not_finite_changes_no_weight() -> None:
    recipe = Recipe(network="bn_small_inception", size=32, precision="float32")
    network = move_network(build(recipe.network, classes=3), "cpu").train()
    with torch.no_grad():
        network.fc.bias[0] = torch.nan
    before = {name: value.clone() for name, value in network.named_parameters()}
    with pytest.raises(LossNotFiniteError, match="the loss became nan") as error:
        train_step(context_of(network, recipe), *batches_of(1, 32, 4)[0], 5)
    assert error.value.step == 5
    assert all(torch.equal(before[name], value) for name, value in network.named_parameters() if name != "fc.bias")


def small_step(recipe: Recipe, photos: int = 8) -> tuple[TrainingContext, list[torch.Tensor], list[torch.Tensor]]:
    """A step of plain gradient descent on a network without BN: its context, and the weights before and after."""
    network = move_network(build("mlp", classes=3, dropout=recipe.dropout or 0.0), "cpu").train()
    context = context_of(network, recipe)
    before = [p.detach().clone() for p in network.parameters()]
    train_step(context, *batches_of(1, 32, photos)[0], 0)
    return context, before, [p.detach() for p in network.parameters()]


def plain(**options: Any) -> Recipe:
    return Recipe.model_validate(
        {"network": "mlp", "size": 32, "precision": "float32", "momentum": 0, "weight_decay": 0, "learning_rate": 1}
        | options
    )


@pytest.mark.parametrize("fraction", [0.25, 4.0])
def test_a_gradient_longer_than_clip_norm_is_scaled_down_to_it(fraction: float) -> None:
    _, before, after = small_step(plain())
    gradients = [b - a for b, a in zip(before, after, strict=True)]  # at a rate of 1
    norm = float(sum((g.double() ** 2).sum() for g in gradients)) ** 0.5
    _, before, after = small_step(plain(clip_norm=fraction * norm))
    for gradient, b, a in zip(gradients, before, after, strict=True):
        torch.testing.assert_close(b - a, gradient * min(1.0, fraction), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("photos", [8, 7, 5, 2, 1])
def test_batches_of_a_step_differ_by_one_photo_and_have_none_alone(photos: int) -> None:
    slices = list(batches_of_step(photos, Recipe(accumulate=3)))
    sizes = [len(range(photos)[part]) for part in slices]
    assert sum(sizes) == photos
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(2, photos)
    assert len(slices) == min(3, max(1, photos // 2))


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    """Of 7 photos, so that the batches differ in size and have to be weighted."""
    _, _, whole = small_step(plain(), photos=7)
    _, before, parts = small_step(plain(accumulate=3), photos=7)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.equal(before[0], parts[0])


def test_each_batch_of_a_step_has_its_own_dropout() -> None:
    recipe = plain(accumulate=2, dropout=0.5)
    network = move_network(build("mlp", classes=3, dropout=0.5), "cpu").train()
    pixels, labels = batches_of(1, 32, 4)[0]
    outputs: list[torch.Tensor] = []

    def forward(images: torch.Tensor) -> torch.Tensor:
        outputs.append(network(images))
        return outputs[-1]

    context = replace(context_of(network, recipe), forward=forward)
    for _ in range(2):
        train_step(context, np.concatenate([pixels, pixels]), np.concatenate([labels, labels]), 3)
        set_learning_rate(context.optimizer, 0.0)
    assert [len(each) for each in outputs] == [4] * 4
    assert not torch.equal(outputs[2], outputs[3])  # the same photos
    before = [each.detach() for each in outputs[2:]]
    outputs.clear()
    train_step(context, np.concatenate([pixels, pixels]), np.concatenate([labels, labels]), 3)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs, strict=True))  # and the same again in a resume


def test_deterministic_restores_torchs_generators_and_choices() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    before = torch.backends.cudnn.deterministic
    with deterministic("cpu"):
        torch.manual_seed(77)
        assert torch.backends.cudnn.deterministic
    assert torch.equal(torch.rand(2), expected)
    assert torch.backends.cudnn.deterministic == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_stop_request_is_recorded_and_the_second_has_its_usual_effect(number: int) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.is_set()
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


def test_a_handler_that_was_installed_from_c_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else before[0])
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.is_set()
            patch.undo()
            assert signal.getsignal(signal.SIGTERM) == before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_nothing_is_recorded() -> None:
    requested: list[bool] = []

    def work() -> None:
        with stop_requests() as stop:
            requested.append(stop.is_set())

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert requested == [False]
    assert signal.getsignal(signal.SIGINT) == before


def test_few_calls_lead_from_the_command_line_to_the_loss(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who follows a training from `main` meets the loss after at most so many functions of bnlab."""
    calls: list[str] = []
    package = str(Path(bnlab.__file__).parent)

    class Arrived(BaseException):
        pass

    def arrive(*_: object, **__: object) -> None:
        calls.extend(frame.name for frame in traceback.extract_stack() if frame.filename.startswith(package))
        raise Arrived

    monkeypatch.chdir(data.parent)
    monkeypatch.setattr(F, "cross_entropy", arrive)
    monkeypatch.setattr("sys.argv", ["bnlab", "train", str(data), *map(str, QUICK)])
    with pytest.raises(Arrived):
        main()
    assert calls[0] == "main"
    assert calls[-4:] == ["train", "fit", "train_step", "loss_of"]
    assert len(calls) <= 7, calls
