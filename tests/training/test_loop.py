import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnlab.classifier.evaluate import Evaluation
from bnlab.data.loader import TrainingLoader
from bnlab.data.preprocess import normalise
from bnlab.nets import build
from bnlab.nets.build import move_network
from bnlab.nets.network import TableNetwork
from bnlab.recipe import Recipe
from bnlab.training import loop
from bnlab.training.build import preprocessing_of
from bnlab.training.loop import (
    MetricAccumulator,
    TrainingContext,
    loss_of,
    metrics_row,
    out_of_patience,
    record_validation,
    train_step,
)
from bnlab.training.mixup import Targets
from bnlab.training.optimizer import make_optimizer, set_learning_rate
from bnlab.training.schedule import Plan
from bnlab.training.state import Row, TrainState
from bnlab.training.validate import ValidationResult
from tests.classifier.test_evaluate import KNOWN, answers


def test_auxiliary_losses_count_for_their_weight() -> None:
    torch.manual_seed(0)
    outputs = tuple(torch.randn(4, 3) for _ in range(3))
    targets = torch.tensor([0, 1, 2, 0])
    main, first, second = (F.cross_entropy(o, targets) for o in outputs)
    recipe = Recipe(label_smoothing=0, auxiliary_weight=0.3)
    torch.testing.assert_close(loss_of(outputs, Targets(targets), recipe), main + 0.3 * first + 0.3 * second)
    torch.testing.assert_close(loss_of(outputs[0], Targets(targets), recipe), main)


def validate(evaluation: Evaluation) -> ValidationResult:
    return ValidationResult(evaluation=evaluation, running=answers([0, 1, 1, 1], [[1, 0, 0]] * 4), seconds=1.5)


def test_the_best_epoch_is_by_accuracy_then_by_loss() -> None:
    plan = Plan(steps=40, batches=10)
    position = TrainState(epoch=0, step=10, size=96, plan=plan, num_images=20, loss=30.0, num_correct=5, seconds=2.0)

    def is_best(evaluation: Evaluation) -> bool:
        return record_validation(position, metrics_row(position, Recipe()), validate(evaluation))

    assert is_best(KNOWN)
    row = position.best
    assert row is not None
    assert (row["epoch"], row["train_loss"], row["train_top1"], row["images_per_second"]) == (1, 1.5, 0.25, 10)
    assert (row["val_top1"], row["val_loss"]) == (KNOWN.top1, KNOWN.loss)
    assert (row["running_top1"], row["recalibration_seconds"], row["size"]) == (0.25, 1.5, 96)
    assert row["learning_rate"] == plan.learning_rate(Recipe(), 9)
    assert not is_best(KNOWN)
    surer = answers(KNOWN.targets.tolist(), [[0.9, 0.1, 0], [0.9, 0.1, 0], [0.2, 0.7, 0.1], [0, 1, 0], [0, 0.1, 0.9]])
    assert surer.top1 == KNOWN.top1
    assert is_best(surer)
    assert not is_best(answers([0, 1], [[0, 1, 0], [1, 0, 0]]))


def test_patience_counts_epochs_since_the_best() -> None:
    rows: list[Row] = [{"epoch": 3, "val_top1": 0.5}, {"epoch": 5, "val_top1": 0.4}, {"epoch": 6, "val_top1": None}]
    position = TrainState(epoch=6, best={"epoch": 3}, rows=rows)
    assert not out_of_patience(position, Recipe(patience=0))
    assert not out_of_patience(position, Recipe(patience=3))
    assert out_of_patience(position, Recipe(patience=2))
    assert not out_of_patience(TrainState(), Recipe(patience=1))


def trainee_of(network: TableNetwork, recipe: Recipe, loader: TrainingLoader | None = None) -> TrainingContext:
    return TrainingContext(
        network=network,
        optimizer=make_optimizer(network, recipe),
        ema=None,
        loader=loader,  # type: ignore[arg-type]
        recipe=recipe,
        preprocessing=preprocessing_of(recipe),
        device="cpu",
        forward=network,
    )


def batches_of(number: int, size: int, batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pictures as unlike as can be: of others a network makes channels of hardly any variance, and of rounding much."""
    random = np.random.default_rng(0)
    blocks = [random.integers(0, 256, (batch, 8, 8, 3), dtype=np.uint8) for _ in range(number)]
    large = [block.repeat(size // 8, 1).repeat(size // 8, 2) for block in blocks]
    return [(pixels, random.integers(0, 3, batch)) for pixels in large]


@pytest.mark.parametrize(
    ("network", "dtype", "steps", "tolerance"),
    [
        ("bn_small_inception", torch.float32, 20, 1e-4),
        ("bn_small_inception", torch.float64, 20, 1e-9),
        ("bn_googlenet", torch.float64, 6, 1e-8),
    ],
    ids=str,
)
def test_losses_are_plain_pytorchs(
    network: str, dtype: torch.dtype, steps: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step against the same written out in the ordinary way: contiguous tensors, torch's own layers, all kept.

    Kernels for channels last add in another order. GoogLeNet, new, makes of each difference one 20 times as large with
    every step, whatever the rate: 1e-16 is 1e-4 after ten. So it is held to what float64 leaves of six.
    """
    rate, size = 1e-4, 64 if network == "bn_googlenet" else 32
    heads = network == "bn_googlenet"
    recipe = Recipe(network=network, size=size, precision="float32", auxiliary=heads)
    options = {"classes": 3, "auxiliary": heads, "dropout": 0.2}
    ours = move_network(build(network, **options), "cpu").train().to(dtype)  # type: ignore[arg-type]
    plain = build(network, norm=nn.BatchNorm2d, **options).train().to(dtype)  # type: ignore[arg-type]
    plain.load_state_dict(ours.state_dict())
    monkeypatch.setattr(loop, "normalise", lambda images, preprocessing: normalise(images, preprocessing).to(dtype))
    context = trainee_of(ours, recipe)
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
        losses[precision] = train_step(trainee_of(network, recipe), pixels, labels, 0)[0].item()
        assert all(p.dtype == torch.float32 for p in network.parameters())
        assert all(b.dtype != torch.bfloat16 for b in network.buffers())
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)
    assert losses["bfloat16"] != losses["float32"]


def test_a_loss_that_is_no_number_changes_nothing() -> None:
    recipe = Recipe(network="bn_small_inception", size=32, precision="float32")
    network = move_network(build(recipe.network, classes=3), "cpu").train()
    with torch.no_grad():
        network.fc.bias[0] = torch.nan
    before = {name: value.clone() for name, value in network.named_parameters()}
    with pytest.raises(FloatingPointError, match="the loss became nan"):
        train_step(trainee_of(network, recipe), *batches_of(1, 32, 4)[0], 0)
    assert all(torch.equal(before[name], value) for name, value in network.named_parameters() if name != "fc.bias")


def test_on_a_gpu_losses_are_looked_at_now_and_then() -> None:
    position = TrainState()
    accumulator = MetricAccumulator(position, read_every=3)
    for loss in (1.0, 2.0):
        accumulator.add(torch.tensor(loss), torch.tensor(1), 4)
    assert (position.step, position.batch, position.num_images, position.loss) == (2, 2, 0, 0)
    accumulator.add(torch.tensor(3.0), torch.tensor(2), 2)
    assert (position.step, position.num_images, position.loss, position.num_correct) == (3, 10, 18.0, 4)
    accumulator.add(torch.tensor(0.5), torch.tensor(0), 4)
    accumulator.add(torch.tensor(torch.inf), torch.tensor(0), 4)
    with pytest.raises(FloatingPointError) as error:
        accumulator.read()
    assert error.value.args == ("the loss became inf", 4)
