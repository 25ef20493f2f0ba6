"""What a training is built of: the network, what is frozen, the optimiser, the caches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bnlab.config import load_settings
from bnlab.data.dataset import Dataset, open_training_data
from bnlab.errors import DataError, UsageError
from bnlab.nets.blocks import conv_norm_acts
from bnlab.nets.freeze import Frozen
from bnlab.nets.network import TableNetwork
from bnlab.progress import NullProgress
from bnlab.recipe import Recipe
from bnlab.training import build
from bnlab.training.build import (
    build_context,
    card_of,
    check_network,
    init_on_first_batch,
    make_caches,
    new_network,
    prepare,
    scratch_copy,
)
from bnlab.training.loop import train_step
from bnlab.training.optimizer import set_learning_rate

SMALL: dict[str, Any] = {
    "network": "bn_small_inception", "size": 32, "batch_size": 8, "width": 0.25, "workers": 0, "precision": "float32",
}  # fmt: skip


@pytest.fixture
def dataset(data: Path) -> Dataset:
    return open_training_data(data, val=0.1, seed=0, progress=NullProgress())


def context_of(dataset: Dataset, **changes: Any) -> build.TrainingContext:
    recipe = Recipe.model_validate(SMALL | changes)
    return build_context(recipe, new_network(recipe, classes=3)[0], dataset, "cpu")


def test_a_network_is_built_as_the_recipe_says() -> None:
    recipe = Recipe(
        network="bn_inception", variant="corrected", norm="ghost:4", width=0.25, auxiliary=True, dropout=0.3
    )
    network, frozen = new_network(recipe, classes=7)
    assert network.arguments.items() >= {"variant": "corrected", "norm": "ghost:4", "width": 0.25}.items()
    assert (list(network.heads.values()), network.fc.out_features, network.dropout.p) == (["aux1", "aux2"], 7, 0.3)
    assert str(frozen) == ""
    assert new_network(Recipe(network="bn_mlp", auxiliary=True), classes=2)[0].heads == {}
    assert len(conv_norm_acts(network)) == 71


@pytest.mark.parametrize(("name", "dropout"), [("inception", 0.4), ("bn_inception", 0.0), ("bn_googlenet", 0.2)])
def test_dropout_is_the_networks_own_unless_set(name: str, dropout: float) -> None:
    with torch.device("meta"):
        assert new_network(Recipe(network=name), classes=2)[0].dropout.p == dropout
        assert new_network(Recipe(network=name, dropout=0.1), classes=2)[0].dropout.p == 0.1


@pytest.mark.parametrize(
    ("options", "problem", "remedy"),
    [
        ({"network": "bn_gogglenet"}, "bn_gogglenet", "did you mean 'bn_googlenet'?"),
        ({"freeze": "stem"}, "freeze stem would freeze random weights", "give init"),
        ({"freeze_bn": True}, "freeze_bn would freeze random weights", "give init"),
        ({"lsuv_init": True}, "lsuv_init", "leave lsuv_init out"),
        ({"norm": "bach"}, "bach", "did you mean 'batch'?"),
        (
            {"network": "small_inception", "init": "x", "freeze_bn": True},
            "small_inception has no normalisation layers to freeze",
            "leave freeze_bn out",
        ),
    ],
    ids=str,
)
def test_networks_that_cannot_be_trained_so_are_refused(options: dict[str, Any], problem: str, remedy: str) -> None:
    with pytest.raises(UsageError) as error:
        check_network(Recipe.model_validate(options))
    assert problem in error.value.problem
    assert remedy in error.value.remedy


def test_checking_a_network_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[TableNetwork] = []
    real = build.new_network

    def noting(recipe: Recipe, *, classes: int) -> tuple[TableNetwork, Frozen]:
        network, frozen = real(recipe, classes=classes)
        built.append(network)
        return network, frozen

    monkeypatch.setattr(build, "new_network", noting)
    check_network(Recipe(network="bn_googlenet", width=16))
    assert built
    assert all(tensor.is_meta for tensor in built[0].state_dict().values())


def test_preparing_resolves_the_settings_and_warns_of_those_without_effect(data: Path) -> None:
    progress = NullProgress()
    settings = load_settings(options=SMALL | {"precision": "auto", "val": 0.5, "step_every": 3, "auxiliary": True})
    prepared = prepare(data, settings, strict=False, progress=progress)
    assert prepared.settings.recipe.precision in ("float32", "bfloat16")
    assert prepared.settings.origin["precision"] == "machine"
    assert (prepared.dataset.classes, prepared.network.fc.out_features) == (("disc", "ring", "stripes"), 3)
    assert [warning.partition(" ")[0] for warning in progress.warnings] == ["step_every", "val", "auxiliary"]


def test_preparing_reports_photos_that_cannot_be_used(data: Path) -> None:
    (data / "train" / "disc" / "bad.jpg").write_text("text")
    settings = load_settings(options=SMALL)
    assert len(prepare(data, settings, strict=False, progress=NullProgress()).dataset.refused) == 1
    with pytest.raises(DataError, match=r"bad\.jpg"):
        prepare(data, settings, strict=True, progress=NullProgress())


def test_a_context_has_the_parts_that_a_checkpoint_saves(dataset: Dataset) -> None:
    assert list(context_of(dataset).parts()) == ["network", "optimizer"]
    context = context_of(dataset, ema=0.9)
    assert list(context.parts()) == ["network", "optimizer", "ema"]
    assert (context.loader.batches, len(context.loader.paths), context.device) == (3, 24, "cpu")
    card = card_of(context)
    assert (card.network, card.classes, card.preprocessing.size) == ("bn_small_inception", dataset.classes, 32)


def test_steps_of_a_scratch_copy_change_neither_it_nor_the_original(dataset: Dataset) -> None:
    context = context_of(dataset, ema=0.9, weight_decay=0.1)
    set_learning_rate(context.optimizer, 0.5)
    scratch = scratch_copy(context)
    before = {name: value.clone() for name, value in context.network.state_dict().items()}
    pixels, labels = next(context.loader.epoch(0, 32))
    for step in range(4):
        train_step(scratch, pixels, labels, step)
    assert all(torch.equal(before[name], value) for name, value in context.network.state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in scratch.network.named_parameters())
    assert scratch.network.conv1.bn.num_batches_tracked == 4
    assert scratch.ema is not None
    assert scratch.ema is not context.ema
    assert context.ema is not None
    assert context.ema.model.n_averaged == 1


def test_lsuv_scales_a_new_network_and_its_average_on_the_first_batch(dataset: Dataset) -> None:
    plain = context_of(dataset, network="small_inception", ema=0.9)
    before = plain.network.conv1.conv.weight.detach().clone()
    init_on_first_batch(plain)
    assert torch.equal(plain.network.conv1.conv.weight, before)
    scaled = context_of(dataset, network="small_inception", ema=0.9, lsuv_init=True)
    init_on_first_batch(scaled)
    ratio = scaled.network.conv1.conv.weight.detach() / before
    assert ratio.std() < 1e-4
    assert abs(ratio.mean() - 1) > 0.01
    assert scaled.ema is not None
    assert torch.equal(scaled.ema.network.conv1.conv.weight, scaled.network.conv1.conv.weight)
    started = context_of(dataset, network="small_inception", lsuv_init=True, init="x")
    init_on_first_batch(started)
    assert torch.equal(started.network.conv1.conv.weight, before)


def test_caches_share_the_memory_that_the_recipe_allows(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(build, "choose_cache", lambda *words, **options: asked.append({"mode": words[0]} | options))
    monkeypatch.setattr(build, "Cache", lambda photos, limit: made.append((photos, limit)))
    photo, pixels = 32 * 32 * 3, np.prod((40, 40, 3)) * 1.5
    recipe = Recipe.model_validate(SMALL | {"cache_gigabytes": 1, "cache": "ram"})
    make_caches(tmp_path, recipe, dataset)
    assert sorted(made) == [(12, 12 * photo), (24, 24 * photo)]
    assert asked[0].items() >= {"mode": "ram", "memory": 2**30 - 36 * photo, "disk": 2**30 - 36 * photo}.items()
    assert asked[0]["estimate"] == pixels
    made.clear()
    make_caches(tmp_path, recipe.model_copy(update={"cache": "none"}), dataset)
    assert sorted(made) == [(12, 0), (24, 0)]
    assert asked[1]["memory"] == 0


def test_the_range_of_the_pixels_is_that_of_the_recipe_and_of_the_card(dataset: Dataset) -> None:
    context = context_of(dataset, pixel_range=4095, max_megapixels=7)
    assert context.loader.reader.pixel_range == card_of(context).preprocessing.pixel_range == (0, 4095)
    assert context.loader.reader.max_megapixels == 7
    assert card_of(context_of(dataset)).preprocessing.pixel_range is None


def test_preparing_warns_of_pictures_that_are_all_dark(data: Path) -> None:
    for path in data.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 4).save(path)
    progress = NullProgress()
    prepare(data, load_settings(options=SMALL), strict=False, progress=progress)
    (warning,) = progress.warnings
    assert "36 pictures" in warning
    assert warning.endswith("train with pixel_range=1023")
    prepare(data, load_settings(options=SMALL | {"pixel_range": 1023}), strict=False, progress=progress)
    assert len(progress.warnings) == 1
