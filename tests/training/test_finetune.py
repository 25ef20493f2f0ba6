"""What a training starts from: networks as the recipe has them, and fine-tuning."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from bnlab import resume, train
from bnlab.classifier.card import to_json
from bnlab.classifier.file import load_network, read_classifier
from bnlab.config import load_settings
from bnlab.errors import ClassifierError, UsageError
from bnlab.files import read_csv
from bnlab.nets.blocks import conv_norm_acts
from bnlab.nets.freeze import Frozen
from bnlab.nets.network import TableNetwork
from bnlab.progress import NullProgress
from bnlab.recipe import Recipe
from bnlab.training import build
from bnlab.training.build import check_network, new_network, without_effect
from bnlab.training.finetune import inherit_from_init
from bnlab.training.run import TrainingResult
from tests.conftest import write_photos

OPTIONS: dict[str, Any] = {"size": 32, "batch_size": 8, "learning_rate": 0.02, "epochs": 1, "workers": 0}


class Notes(NullProgress):
    """What was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        """Keep it."""
        self.notes.append(text)

    def warn(self, text: str) -> None:
        """Keep it."""
        self.warnings.append(text)


def trained_on(data: Path, name: str = "run", progress: NullProgress | None = None, **changes: Any) -> TrainingResult:
    return train(data, name=name, runs=data.parent / "runs", progress=progress, **(OPTIONS | changes))


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return read_classifier(path)[0]


def changed(result: TrainingResult, init: Path) -> set[str]:
    """The tensors that are not as in the file the training started from."""
    before, after = tensors_of(init), tensors_of(result.run.last)
    return {key for key in before if not torch.equal(before[key], after[key])}


def test_fine_tuning_keeps_the_head_only_for_the_same_classes(data: Path, trained: Path) -> None:
    tensors, card = read_classifier(trained / "best.safetensors")
    frozen = {"init": str(trained / "best.safetensors"), "learning_rate": 1e-12, "epochs": 1, "weight_decay": 0}
    same, _ = read_classifier(trained_on(data, "same", **frozen).run.last)
    torch.testing.assert_close(same["fc.weight"], tensors["fc.weight"])
    torch.testing.assert_close(same["conv1.conv.weight"], tensors["conv1.conv.weight"])
    for side in ("train", "val"):
        (data / side / "disc").rename(data / side / "zebra")  # now the last class, and the first is ring

    class Notes(NullProgress):
        notes: list[str] = []  # noqa: RUF012

        def note(self, text: str) -> None:
            self.notes.append(text)

    progress = Notes()
    result = trained_on(data, "other", progress, **frozen)
    other, _ = read_classifier(result.run.last)
    torch.testing.assert_close(other["conv1.conv.weight"], tensors["conv1.conv.weight"])
    assert not torch.allclose(other["fc.weight"], tensors["fc.weight"])
    assert any(n.endswith("the last layer is new, for its classes were disc, ring, stripes") for n in progress.notes)
    assert card.preprocessing.mean == load_settings().recipe.mean


def test_fine_tuning_takes_network_and_colours_from_the_file(data: Path, trained: Path) -> None:
    init = str(trained / "best.safetensors")
    options = {k: v for k, v in OPTIONS.items() if k != "network"} | {"epochs": 1}
    result = train(data, name="a", runs=data.parent / "runs", init=init, **options)  # type: ignore[arg-type]
    _, card = read_classifier(result.run.best)
    assert (card.network, card.preprocessing.mean) == ("bn_small_inception", (0.485, 0.456, 0.406))
    with pytest.raises(UsageError, match="has the network bn_small_inception, not googlenet: leave network out"):
        trained_on(data, "b", init=init, network="googlenet")
    assert "network: bn_small_inception  # (init)" in result.run.recipe.read_text()
    assert card.recipe["init"] == "best.safetensors"
    with pytest.raises(
        UsageError, match=r"has the mean \(0.485, 0.456, 0.406\), not \(0.0, 0.0, 0.0\): leave mean out"
    ):
        train(data, name="d", runs=data.parent / "runs", init=init, mean=[0, 0, 0], **options)  # type: ignore[arg-type]
    with pytest.raises(ClassifierError, match="there is no classifier file nothere"):
        trained_on(data, "c", init="nothere")


def test_the_trunk_goes_slower_unless_it_is_told_otherwise(data: Path, trained: Path) -> None:
    init = str(trained / "best.safetensors")
    result = trained_on(data, init=init)
    assert "backbone_lr_factor: 0.1  # (init)" in result.run.recipe.read_text()
    assert (
        "backbone_lr_factor: 1.0  # (yours)"
        in trained_on(data, "own", init=init, backbone_lr_factor=1.0).run.recipe.read_text()
    )
    still = trained_on(data, "still", init=init, backbone_lr_factor=0.0, weight_decay=0.0)
    assert not [n for n in changed(still, trained / "best.safetensors") if n.endswith(("conv.weight", "bn.weight"))]
    assert "fc.weight" in changed(still, trained / "best.safetensors")


@pytest.mark.parametrize(
    ("options", "frozen", "told"),
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
def test_what_is_frozen_is_as_in_the_file_and_is_told(
    data: Path, trained: Path, options: dict[str, Any], frozen: Any, told: str
) -> None:
    init = trained / "best.safetensors"
    progress = Notes()
    result = trained_on(data, init=str(init), progress=progress, epochs=2, **options)
    counts = {n for n in tensors_of(init) if n.endswith("num_batches_tracked")}  # of recalibration: alike in both
    assert changed(result, init) - counts == {n for n in tensors_of(init) if not frozen(n)} - counts
    (note,) = [n for n in progress.notes if n.startswith("frozen: ")]
    assert note.startswith(told)
    assert f"frozen: {result.frozen}" == note
    assert f"Not trained: {result.frozen}." in result.run.report.read_text()
    document = result.to_json()["frozen"]
    assert (document["parameters"], document["norms"]) == (result.frozen.parameters, result.frozen.norms)
    assert result.frozen.norms


def test_a_resumed_run_is_frozen_still(data: Path, trained: Path) -> None:
    """From its first epoch, where nothing was saved yet but the recipe, and where it was."""
    init = trained / "best.safetensors"
    whole = trained_on(data, "whole", init=str(init), epochs=2, freeze="stem", freeze_bn=True)

    class Stop(NullProgress):
        def note(self, text: str) -> None:
            if text.startswith("epoch 1/2"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained_on(data, "part", Stop(), init=str(init), epochs=2, freeze="stem", freeze_bn=True)
    part = resume("part", runs=data.parent / "runs")
    assert part.run.last.read_bytes() == whole.run.last.read_bytes()
    assert part.frozen == whole.frozen


def test_another_number_of_classes_with_frozen_parts(trained: Path, tmp_path: Path) -> None:
    """A new last layer on a backbone that stays: the everyday use."""
    write_photos(tmp_path / "two" / "train", each=6, classes=("disc", "ring"))
    write_photos(tmp_path / "two" / "val", each=2, classes=("disc", "ring"), first=50)
    result = trained_on(tmp_path / "two", init=str(trained / "best.safetensors"), freeze="backbone", epochs=2)
    network, card = load_network(result.run.last)
    assert card.classes == ("disc", "ring")
    assert network.fc.out_features == 2


def test_the_shape_of_the_network_comes_with_the_file(data: Path, tmp_path: Path) -> None:
    shape = {"network": "small_inception", "width": 0.5, "activation": "elu", "norm": "batch", "placement": "after"}
    first = trained_on(data, "first", **shape)
    _, card = read_classifier(first.run.last)
    assert card.arguments.items() >= {"width": 0.5, "activation": "elu", "norm": "batch", "placement": "after"}.items()
    second = trained_on(data, "second", init=str(first.run.last))
    text = second.run.recipe.read_text()
    for key, value in shape.items():
        assert f"{key}: {value}  # (init)" in text
    with pytest.raises(UsageError, match=r"has the width 0.5, not 0.25: leave width out"):
        trained_on(data, "third", init=str(first.run.last), width=0.25)
    ghost = trained_on(data, "ghost", init=str(first.run.last), norm="ghost:4")
    assert read_classifier(ghost.run.last)[1].arguments["norm"] == "ghost:4"


def test_fitting_to_data_begins_a_training_and_nothing_else(data: Path) -> None:
    plain = trained_on(data, "plain", network="small_inception")
    fitted = trained_on(data, "fitted", network="small_inception", lsuv_init=True)
    again = trained_on(data, "again", network="small_inception", lsuv_init=True)
    assert fitted.run.last.read_bytes() == again.run.last.read_bytes()
    assert float(next(iter(read_csv(plain.run.metrics)))["train_loss"]) != float(
        next(iter(read_csv(fitted.run.metrics)))["train_loss"]
    )

    class Stop(NullProgress):
        def note(self, text: str) -> None:
            if text.startswith("epoch 1/2"):
                raise KeyboardInterrupt

    options = {"network": "small_inception", "lsuv_init": True, "epochs": 2}
    whole = trained_on(data, "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        trained_on(data, "part", Stop(), **options)
    assert resume("part", runs=data.parent / "runs").run.last.read_bytes() == whole.run.last.read_bytes()


def test_a_recipes_network_is_built_as_it_says() -> None:
    recipe = Recipe(
        network="bn_inception", variant="corrected", norm="ghost:4", width=0.25, auxiliary=True, dropout=0.3
    )
    network, frozen = new_network(recipe, classes=7)
    assert network.arguments.items() >= {"variant": "corrected", "norm": "ghost:4", "width": 0.25}.items()
    assert (list(network.heads.values()), network.fc.out_features, network.dropout.p) == (["aux1", "aux2"], 7, 0.3)
    assert str(frozen) == ""
    assert new_network(Recipe(network="bn_mlp", auxiliary=True), classes=2)[0].heads == {}
    assert len(conv_norm_acts(network)) == 71


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "bn_gogglenet"}, "no network is called 'bn_gogglenet': did you mean 'bn_googlenet'?"),
        ({"freeze": "stem"}, "freeze stem would freeze random weights: give --init FILE, the classifier to start from"),
        ({"freeze_bn": True}, "freeze_bn would freeze random weights: give --init FILE, the classifier to start from"),
        (
            {"lsuv_init": True},
            "normalisation would undo the scale that lsuv_init gives to weights: "
            "leave lsuv_init out, or use a network without normalisation, such as googlenet",
        ),
        ({"norm": "bach"}, "no norm is called 'bach': did you mean 'batch'?"),
    ],
    ids=str,
)
def test_refusals(data: Path, options: dict[str, Any], message: str) -> None:
    """Before a photo is read or a folder made."""
    with pytest.raises(UsageError) as error:
        trained_on(data, **options)
    assert str(error.value) == message
    assert not (data.parent / "runs").exists()


def test_checking_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(
    ("options", "problem", "remedy"),
    [
        ({"norm": "none"}, "has the norm batch, not none", "leave norm out"),
        ({"norm": "whitening:8"}, "has the norm batch, not whitening:8", "leave norm out"),
        ({"activation": "tanh"}, "has the activation relu, not tanh", "leave activation out"),
    ],
    ids=str,
)
def test_what_the_file_has_cannot_be_set_otherwise(
    data: Path, trained: Path, tmp_path: Path, options: dict[str, Any], problem: str, remedy: str
) -> None:
    """By an option or by a recipe of one's own; what a shipped recipe says gives way."""
    init = str(trained / "best.safetensors")
    (tmp_path / "own.yaml").write_text("\n".join(f"{key}: {value}" for key, value in options.items()))
    for way in (options, {"recipe": tmp_path / "own.yaml"}):
        with pytest.raises(UsageError) as error:
            trained_on(data, init=init, **way)
        assert str(error.value) == f"--init {init} {problem}: {remedy}"
    adopted = inherit_from_init(load_settings("classic", {"init": init})).recipe
    assert (adopted.network, adopted.mean, adopted.size) == ("bn_small_inception", (0.485, 0.456, 0.406), 224)


def test_the_size_comes_with_the_file_unless_it_is_set(trained: Path) -> None:
    init = str(trained / "best.safetensors")
    assert inherit_from_init(load_settings(options={"init": init})).recipe.size == 32
    assert inherit_from_init(load_settings(options={"init": init, "size": 64})).recipe.size == 64


def test_a_network_without_bn_has_none_to_freeze(data: Path) -> None:
    plain = trained_on(data, "plain", network="small_inception")
    with pytest.raises(UsageError) as error:
        trained_on(data, init=str(plain.run.last), freeze_bn=True)
    assert str(error.value) == "small_inception has no normalisation layers to freeze: leave freeze_bn out"


def test_a_file_with_too_few_rows_is_refused_before_anything_is_made(data: Path, trained: Path, tmp_path: Path) -> None:
    tensors, card = read_classifier(trained / "best.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"][:1]
    path = tmp_path / "short.safetensors"
    path.write_bytes(safetensors.torch.save(tensors, {"bnlab": to_json(card)}))
    with pytest.raises(
        ClassifierError, match=r"the tensor fc.weight of .* has the shape \[1, 192\], and .* needs \[3, 192\]"
    ):
        trained_on(data, init=str(path))
    assert not (data.parent / "runs").exists()


def test_parts_of_one_photo_have_nothing_to_normalise_by(data: Path) -> None:
    with pytest.raises(UsageError) as error:
        trained_on(data, network="bn_mlp", norm="ghost:1")
    assert str(error.value).startswith("a part of a batch has nothing to normalise by (Expected more than 1 value per")
    assert str(error.value).endswith("): take a larger batch_size, size or ghost batch")


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        ({"network": "bn_mlp", "auxiliary": True}, ["auxiliary has no effect: bn_mlp has no auxiliary heads"]),
        (
            {"network": "mlp", "norm_eps": 0.1, "conv_bias": True},
            [f"{key} has no effect: mlp is not normalised" for key in ("norm_eps", "conv_bias")],
        ),
        ({"network": "bn_mlp", "norm_eps": 0.1}, []),
        (
            {"init": "x", "freeze": "backbone", "backbone_lr_factor": 0.5},
            ["backbone_lr_factor has no effect on a backbone that is frozen"],
        ),
        ({"init": "x", "initialisation": "he"}, ["initialisation has no effect: it is for a training without init"]),
    ],
    ids=str,
)
def test_options_without_effect_say_so(options: dict[str, Any], sentences: list[str]) -> None:
    settings = load_settings(options=options)
    network, _ = new_network(settings.recipe, classes=2)
    assert without_effect(settings, network) == sentences


@pytest.mark.parametrize(("name", "dropout"), [("inception", 0.4), ("bn_inception", 0.0), ("bn_googlenet", 0.2)])
def test_dropout_is_the_networks_own_unless_set(name: str, dropout: float) -> None:
    assert new_network(Recipe(network=name), classes=2)[0].dropout.p == dropout
    assert new_network(Recipe(network=name, dropout=0.1), classes=2)[0].dropout.p == 0.1
