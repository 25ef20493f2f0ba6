import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bnlab.data.cache import Cache
from bnlab.data.dataset import open_training_data
from bnlab.errors import DivergedError, PhotoError, UsageError
from bnlab.nets import build
from bnlab.norm import recalibrate
from bnlab.progress import NullProgress
from bnlab.recipe import Recipe
from bnlab.training.build import TrainingContext, build_context
from bnlab.training.validate import Validator, calibration_batches, keeps_statistics, recalibrate_network

MakeContext = Callable[..., TrainingContext]


@pytest.fixture
def make_context(data: Path) -> MakeContext:
    """The small network and 24 photos to train on; keys of a recipe change it."""
    dataset = open_training_data(data, val=0.1, seed=0, progress=NullProgress())

    def make(**changes: object) -> TrainingContext:
        recipe = Recipe.model_validate(
            {"network": "bn_small_inception", "size": 32, "batch_size": 8, "width": 0.25, "workers": 0} | changes
        )
        network = build(recipe.network, classes=3, width=recipe.width)
        return build_context(recipe, network, dataset, "cpu")

    return make


def validator_of(context: TrainingContext, **options: bool) -> Validator:
    photos = context.dataset.in_split("val")
    return Validator(context, photos, sample_cache=Cache(24, 0), val_cache=Cache(12, 0), **options)


def test_it_validates_a_copy_by_recalibrated_statistics(make_context: MakeContext) -> None:
    context = make_context()
    before = {name: value.clone() for name, value in context.network.state_dict().items()}
    validator = validator_of(context)
    result = validator(context.network, NullProgress())
    assert all(torch.equal(before[name], value) for name, value in context.network.state_dict().items())
    assert result.recalibration is not None
    assert (result.recalibration.images, result.evaluation.n) == (24, 12)
    assert result.recalibration.layers["conv1.bn"].mean_off > 0.1  # the running statistics are the initial ones
    recalibrate(context.network, calibration_batches(context, 24, 8))
    expected = context.network.state_dict()
    assert torch.equal(validator.network.state_dict()["conv1.bn.running_mean"], expected["conv1.bn.running_mean"])
    assert result.running is not None
    assert not (result.running.probabilities == result.evaluation.probabilities).all()
    assert result.scores is not None
    assert result.scores.means()["population"] == pytest.approx(result.evaluation.top1)


def test_it_validates_the_weights_that_it_is_given(make_context: MakeContext) -> None:
    context = make_context()
    validator = validator_of(context)
    first = validator(context.network, NullProgress()).evaluation
    with torch.no_grad():
        context.network.fc.bias.copy_(torch.tensor([0.0, 100.0, 0.0]))
    second = validator(context.network, NullProgress()).evaluation
    assert set(second.predicted) == {1}
    assert not (first.probabilities == second.probabilities).all()


def test_the_running_statistics_are_evaluated_only_if_asked_for(make_context: MakeContext) -> None:
    context = make_context()
    result = validator_of(context, evaluate_running=False)(context.network, NullProgress())
    assert (result.running, result.scores) == (None, None)
    assert result.recalibration is not None


@pytest.mark.parametrize(
    "changes", [{"recalibration_images": 0}, {"freeze_bn": True}, {"network": "small_inception"}], ids=str
)
def test_without_anything_to_recalibrate_it_validates_by_the_running_statistics(
    make_context: MakeContext, changes: dict[str, object]
) -> None:
    context = make_context(**changes)
    validator = validator_of(context)
    result = validator(context.network, NullProgress())
    assert (result.recalibration, result.running, result.seconds) == (None, None, 0.0)
    assert all(
        torch.equal(a, b)
        for a, b in zip(context.network.state_dict().values(), validator.network.state_dict().values(), strict=True)
    )


def test_results_that_are_not_finite_are_a_divergence(make_context: MakeContext) -> None:
    context = make_context()
    with torch.no_grad():
        context.network.conv1.conv.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(DivergedError, match=r"reach .* in recalibration: train with a lower learning_rate"):
        validator_of(context)(context.network, NullProgress())
    context = make_context(recalibration_images=0)
    with torch.no_grad():
        context.network.fc.bias[0] = math.nan
    with pytest.raises(DivergedError, match="not finite"):
        validator_of(context)(context.network, NullProgress())


def test_one_photo_is_too_few_to_recalibrate_a_linear_layer_on(make_context: MakeContext) -> None:
    context = make_context(network="bn_mlp", width=1.0)
    with pytest.raises(UsageError, match=r"recalibration: .*: raise recalibration_images"):
        recalibrate_network(context.network, calibration_batches(context, 1, 8))


def test_a_photo_that_can_no_longer_be_read_is_an_error(make_context: MakeContext, data: Path) -> None:
    context = make_context(recalibration_images=0)
    (data / "val" / "ring" / "ring100.png").write_text("text")
    with pytest.raises(PhotoError, match=r"ring100\.png"):
        validator_of(context)(context.network, NullProgress())
    (data / "train" / "ring" / "ring000.png").write_text("text")
    with pytest.raises(PhotoError, match=r"ring000\.png"):
        list(calibration_batches(context, 24, 8))


def test_statistics_are_those_of_layers_with_running_means() -> None:
    assert keeps_statistics(build("bn_mlp", classes=2))
    assert not keeps_statistics(build("mlp", classes=2))


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"),
    [
        (12, 5, [5, 5, 2]),
        (11, 5, [4, 4, 3]),  # not 5, 5, 1
        (9, 4, [3, 3, 3]),
        (7, 2, [4, 3]),
        (3, 2, [3]),
        (2, 8, [2]),
        (1, 8, [1]),
    ],
)
def test_no_single_photo_is_left_over(
    make_context: MakeContext, images: int, batch_size: int, sizes: list[int]
) -> None:
    """It has no variance behind a fully connected layer, and a training would end at its first validation."""
    assert [len(batch) for batch in calibration_batches(make_context(), images, batch_size)] == sizes
