"""Trainings that start from a classifier file: what they take from it, and what stays as it is."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from bnlab import resume, train
from bnlab.classifier.file import Card, load_network, read_classifier, save_classifier, to_json
from bnlab.classifier.seen import SeenPhotos
from bnlab.config import load_settings
from bnlab.data.split_csv import read_split_csv, write_split_csv
from bnlab.errors import ClassifierError, UsageError
from bnlab.nets import build
from bnlab.progress import NullProgress
from bnlab.recipe import Recipe
from bnlab.training.build import preprocessing_of
from bnlab.training.finetune import inherit_from_init, load_pretrained, read_history
from bnlab.training.session import TrainingResult
from tests.conftest import Notes, write_photos

OPTIONS: dict[str, Any] = {"size": 32, "batch_size": 12, "learning_rate": 0.02, "epochs": 1, "workers": 0}


def trained_on(data: Path, name: str = "run", progress: NullProgress | None = None, **changes: Any) -> TrainingResult:
    return train(data, name=name, runs=data.parent / "runs", progress=progress, **(OPTIONS | changes))


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return read_classifier(path)[0]


def changed(result: TrainingResult, init: Path) -> set[str]:
    """The tensors that are not as in the file the training started from."""
    before, after = tensors_of(init), tensors_of(result.run.last)
    return {key for key in before if not torch.equal(before[key], after[key])}


@pytest.fixture
def init(trained: Path) -> str:
    return str(trained / "best.safetensors")


@pytest.fixture
def spoilt(init: str, tmp_path: Path) -> Callable[[Callable[[dict[str, torch.Tensor]], object]], str]:
    """Copies the file with its tensors changed by a function."""

    def spoil(change: Callable[[dict[str, torch.Tensor]], object]) -> str:
        tensors, card = read_classifier(Path(init))
        change(tensors)
        (tmp_path / "x.safetensors").write_bytes(safetensors.torch.save(tensors, {"bnlab": to_json(card)}))
        return str(tmp_path / "x.safetensors")

    return spoil


def test_the_last_layer_follows_the_order_of_the_classes(init: str) -> None:
    tensors, card = read_classifier(Path(init))
    network = build("bn_small_inception", classes=3, seed=9)
    load_pretrained(network, ("stripes", "disc", "ring"), init, NullProgress())
    assert card.classes == ("disc", "ring", "stripes")
    assert torch.equal(network.fc.weight, tensors["fc.weight"][[2, 0, 1]])
    assert torch.equal(network.conv1.conv.weight, tensors["conv1.conv.weight"])


def test_for_other_classes_the_last_layer_is_new(init: str) -> None:
    tensors, _ = read_classifier(Path(init))
    progress, network = Notes(), build("bn_small_inception", classes=2, seed=9)
    before = network.fc.weight.detach().clone()
    load_pretrained(network, ("disc", "zebra"), init, progress)
    assert torch.equal(network.fc.weight, before)
    assert torch.equal(network.conv1.conv.weight, tensors["conv1.conv.weight"])
    assert progress.notes[0].endswith("the last layer is new, for its classes were disc, ring, stripes")


def test_network_colours_size_and_learning_rates_come_from_the_file(init: str) -> None:
    recipe = inherit_from_init(load_settings("classic", {"init": init})).recipe
    assert (recipe.network, recipe.mean, recipe.size) == ("bn_small_inception", (0.485, 0.456, 0.406), 224)
    settings = inherit_from_init(load_settings(options={"init": init}))
    assert (settings.recipe.size, settings.recipe.backbone_lr_factor) == (32, 0.1)
    assert {settings.origin[key] for key in ("network", "size", "mean", "backbone_lr_factor")} == {"init"}
    own = inherit_from_init(load_settings(options={"init": init, "size": 64, "backbone_lr_factor": 1.0}))
    assert (own.recipe.size, own.recipe.backbone_lr_factor) == (64, 1.0)
    assert {own.origin[key] for key in ("size", "backbone_lr_factor")} == {"yours"}


def test_a_run_folder_stands_for_its_best_classifier(init: str, trained: Path) -> None:
    settings = inherit_from_init(load_settings(options={"init": trained}))
    assert (settings.recipe.init, settings.origin["init"]) == (init, "yours")
    assert settings == inherit_from_init(load_settings(options={"init": init}))
    with pytest.raises(ClassifierError, match="is a folder: pass a classifier file, or a run's folder with best"):
        inherit_from_init(load_settings(options={"init": trained.parent}))


def test_the_pixel_range_comes_from_the_file_unless_it_is_set(init: str, tmp_path: Path) -> None:
    network, card = load_network(Path(init))
    own = str(tmp_path / "range.safetensors")
    save_classifier(Path(own), network, replace(card, preprocessing=replace(card.preprocessing, pixel_range=(0, 4095))))
    for recipe in ("default", "classic"):
        assert inherit_from_init(load_settings(recipe, {"init": own})).recipe.pixel_range == (0, 4095)
        chosen = load_settings(recipe, {"init": own, "pixel_range": [5, 1023]})
        assert inherit_from_init(chosen).recipe.pixel_range == (5, 1023)
        assert inherit_from_init(load_settings(recipe, {"init": init})).recipe.pixel_range is None


def test_without_a_file_nothing_is_inherited() -> None:
    settings = load_settings()
    assert inherit_from_init(settings) == settings


@pytest.mark.parametrize(
    ("options", "has"),
    [
        ({"network": "googlenet"}, "the network bn_small_inception, not googlenet"),
        ({"mean": [0, 0, 0]}, r"the mean (0.485, 0.456, 0.406), not (0.0, 0.0, 0.0)"),
        ({"norm": "none"}, "the norm batch, not none"),
        ({"norm": "whitening:8"}, "the norm batch, not whitening:8"),
        ({"activation": "tanh"}, "the activation relu, not tanh"),
        ({"width": 0.25}, "the width 1.0, not 0.25"),
    ],
    ids=str,
)
def test_what_the_file_has_cannot_be_set_otherwise(
    init: str, tmp_path: Path, options: dict[str, Any], has: str
) -> None:
    """By an option or by a recipe file of the user; what a shipped recipe says gives way."""
    (tmp_path / "own.yaml").write_text("\n".join(f"{key}: {value}" for key, value in options.items()))
    for settings in (
        load_settings(options=options | {"init": init}),
        load_settings(tmp_path / "own.yaml", {"init": init}),
    ):
        with pytest.raises(UsageError) as error:
            inherit_from_init(settings)
        assert error.value.problem == f"init {init} has {has}"
        assert error.value.remedy == f"leave {next(iter(options))} out"


def test_the_architecture_comes_with_the_file_and_ghost_batches_may_differ(tmp_path: Path) -> None:
    shape = {"width": 0.5, "activation": "elu", "norm": "batch", "placement": "after"}
    network = build("small_inception", classes=3, **shape)  # type: ignore[arg-type]
    card = Card(
        network="small_inception",
        arguments=network.arguments,
        classes=("disc", "ring", "stripes"),
        preprocessing=preprocessing_of(Recipe(size=32)),
    )
    path = tmp_path / "shape.safetensors"
    save_classifier(path, network, card)
    recipe = inherit_from_init(load_settings(options={"init": str(path)})).recipe
    assert {key: getattr(recipe, key) for key in shape} == shape
    ghost = inherit_from_init(load_settings(options={"init": str(path), "norm": "ghost:4"})).recipe
    assert (ghost.norm, ghost.width) == ("ghost:4", 0.5)


def test_files_that_do_not_fit_their_network_are_refused_before_a_run_folder_is_made(
    data: Path, spoilt: Callable[..., str]
) -> None:
    lacking = spoilt(lambda tensors: tensors.pop("inception2a.branch1.conv.weight"))
    with pytest.raises(ClassifierError, match=r"lacks the tensor inception2a.branch1.conv.weight"):
        trained_on(data, init=lacking)
    short = spoilt(lambda tensors: tensors.update({"fc.weight": tensors["fc.weight"][:1]}))
    with pytest.raises(ClassifierError, match=r"fc.weight of .* has the shape \[1, 192\], and .* needs \[3, 192\]"):
        trained_on(data, init=short)
    with pytest.raises(ClassifierError, match="nothere"):
        trained_on(data, init="nothere")
    assert not (data.parent / "runs").exists()


def test_a_backbone_with_learning_rate_0_stays(data: Path, init: str) -> None:
    still = trained_on(data, init=init, backbone_lr_factor=0.0, weight_decay=0.0)
    assert not [n for n in changed(still, Path(init)) if n.endswith(("conv.weight", "bn.weight"))]
    assert "fc.weight" in changed(still, Path(init))
    assert "network: bn_small_inception  # (init)" in still.run.recipe.read_text()
    assert read_classifier(still.run.best)[1].recipe["init"] == "best.safetensors"  # without its folder


@pytest.mark.parametrize(
    ("options", "frozen", "reported"),
    [
        (
            {"freeze": "backbone"},
            lambda n: not n.startswith("fc."),
            "frozen: conv1 to inception4b and the statistics, gamma and beta of 43 normalisation layers (",
        ),
        (
            {"freeze": "stem"},
            lambda n: n.startswith("conv1."),
            "frozen: conv1 and the statistics, gamma and beta of 1 normalisation layer (928 of 269,203 parameters)",
        ),
        (
            {"freeze_bn": True},
            lambda n: ".bn." in n,
            "frozen: the statistics, gamma and beta of 43 normalisation layers (2,664 of 269,203 parameters)",
        ),
    ],
)
def test_what_is_frozen_stays_as_in_the_file_and_is_reported(
    data: Path, init: str, options: dict[str, Any], frozen: Callable[[str], bool], reported: str
) -> None:
    progress = Notes()
    result = trained_on(data, init=init, progress=progress, **options)
    tensors = tensors_of(Path(init))
    counts = {n for n in tensors if n.endswith("num_batches_tracked")}  # of the recalibration, alike in both
    assert changed(result, Path(init)) - counts == {n for n in tensors if not frozen(n)} - counts
    (note,) = [n for n in progress.notes if n.startswith("frozen: ")]
    assert note.startswith(reported)
    assert note == f"frozen: {result.frozen}"
    assert f"Not trained: {result.frozen}." in result.run.report.read_text()
    document = result.to_json()["frozen"]
    assert (document["parameters"], document["norms"]) == (result.frozen.parameters, result.frozen.norms)
    assert result.frozen.norms


class StopAfterOneEpoch(NullProgress):
    def note(self, text: str) -> None:
        if text.startswith("epoch 1/2"):
            raise KeyboardInterrupt


def test_a_resumed_run_has_the_same_parts_frozen(data: Path, init: str) -> None:
    """Interrupted after its first epoch, when the file in `init` may be gone."""
    options = {"init": init, "epochs": 2, "freeze": "stem", "freeze_bn": True}
    whole = trained_on(data, "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        trained_on(data, "part", StopAfterOneEpoch(), **options)
    part = resume("part", runs=data.parent / "runs")
    assert part.run.last.read_bytes() == whole.run.last.read_bytes()
    assert part.frozen == whole.frozen


@pytest.fixture
def unsplit(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "unsplit", each=13)


def tiny(data: Path, name: str, progress: NullProgress | None = None, **options: Any) -> TrainingResult:
    network = {} if "init" in options else {"network": "bn_mlp"}
    return trained_on(data, name, progress, **{"size": 16, "val": 0.3, **network, **options})


def test_another_seed_holds_out_the_same_photos(unsplit: Path) -> None:
    first = tiny(unsplit, "first")
    progress = NullProgress()
    second = tiny(unsplit, "second", progress, init=str(first.run.best), seed=1)
    assert second.run.split.read_bytes() == first.run.split.read_bytes()
    assert progress.warnings == []
    assert (second.seen.train, second.to_json()["seen_in_training"]) == (0, 0)


def test_photos_of_val_and_test_that_an_ancestor_was_trained_on_are_reported(unsplit: Path) -> None:
    """Through two generations: what the second training did not see, the first did."""
    first = tiny(unsplit, "first")
    split = read_split_csv(first.run.split)
    only_val = unsplit.parent / "only_val.csv"
    held_out = sorted(split.in_split("val"), key=lambda photo: photo.label != "ring")
    write_split_csv(only_val, [replace(p, split="train" if i else "val") for i, p in enumerate(held_out)])
    second = tiny(only_val, "second", init=str(first.run.best))
    assert second.seen.train == 0

    progress = NullProgress()
    before = list(split.in_split("train"))
    mixed = [replace(p, split=("train", "val", "test")[i % 3]) for i, p in enumerate(before)]
    write_split_csv(only_val, [*mixed, replace(held_out[0], split="test")])
    third = tiny(only_val, "third", progress, init=str(second.run.best))
    in_val, in_test = (sum(p.split == name for p in mixed) for name in ("val", "test"))
    warned = [warning.partition(",")[0] for warning in progress.warnings]
    assert warned == [
        "val has no effect: these photos already have a val split",
        f"{in_val} of {in_val} photos of val are among those the file in init was trained on",
        f"{in_test} of {in_test + 1} photos of test are among those the file in init was trained on",
        f"1 of {in_test + 1} photos of test is among those by which the file in init was chosen as the best epoch",
    ]
    assert all("split.csv as DATA" in warning for warning in progress.warnings[1:])
    assert (third.seen.train, third.seen.n) == (in_val, in_val)
    assert f"{in_val} of {in_val} photos of val are among those the file in init was trained on." in (
        third.run.report.read_text("utf-8")
    )
    card = read_classifier(third.run.best)[1]
    assert card.metrics["seen_in_training"] == in_val
    assert [a.photos["train"] for a in card.ancestors] == [len(before), len(held_out) - 1]
    assert card.ancestors[0].split_sha256 == read_classifier(first.run.best)[1].split_sha256
    assert card.seen.count(split).train + card.seen.count(split).val == len(split)


def test_of_a_file_that_does_not_say_what_it_saw_nothing_is_claimed(unsplit: Path, tmp_path: Path) -> None:
    first = tiny(unsplit, "first")
    network, card = load_network(first.run.best)
    save_classifier(tmp_path / "imported.safetensors", network, replace(card, seen=SeenPhotos()))
    progress = Notes()
    second = tiny(unsplit, "second", progress, init=str(tmp_path / "imported.safetensors"))
    assert progress.warnings == []
    assert any("does not say which photos it was trained on" in note for note in progress.notes)
    assert second.to_json()["seen_in_training"] is None
    assert not read_classifier(second.run.best)[1].seen.complete


def test_a_resumed_run_knows_its_ancestors_when_the_first_file_is_gone(unsplit: Path) -> None:
    first = tiny(unsplit, "first")
    options = {"init": str(first.run.best), "epochs": 2, "split_seed": 1}
    whole = tiny(unsplit, "whole", **options)
    assert whole.seen.train

    with pytest.raises(KeyboardInterrupt):
        tiny(unsplit, "part", StopAfterOneEpoch(), **options)
    first.run.best.unlink()
    part = resume("part", runs=unsplit.parent / "runs")
    assert part.run.best.read_bytes() == whole.run.best.read_bytes()
    assert part.seen == whole.seen

    for broken in ("", "{}", '{"seen": {"train": 3}}'):
        part.run.ancestors.write_text(broken)
        assert not read_history(part.run).seen.complete
    part.run.ancestors.unlink()  # as in a run of an older bnlab
    assert not read_history(part.run).seen.complete


def test_another_number_of_classes_on_a_frozen_backbone(init: str, tmp_path: Path) -> None:
    """A new last layer on a backbone that stays: the everyday use."""
    write_photos(tmp_path / "two" / "train", each=6, classes=("disc", "ring"))
    write_photos(tmp_path / "two" / "val", each=2, classes=("disc", "ring"), first=50)
    result = trained_on(tmp_path / "two", init=init, freeze="backbone")
    network, card = load_network(result.run.last)
    assert card.classes == ("disc", "ring")
    assert network.fc.out_features == 2
