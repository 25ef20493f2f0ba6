from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bnlab.lab.experiment import WITH_BN, WITHOUT_BN
from bnlab.lab.measurements import JobContext
from bnlab.lab.records import Results, number, numbers
from bnlab.lab.replay import Batch
from bnlab.lab.studies import covariate_shift as study
from bnlab.lab.studies.covariate_shift import (
    ARMS,
    EQUAL,
    NOISY,
    NoisyBatchNorm,
    Shift,
    compared,
    conclude,
    set_other_noise,
    shifted_layers,
)
from bnlab.lab.trained_network import train, with_norm
from bnlab.lab.verdict import Verdict
from bnlab.nets import build
from bnlab.norm import BatchNorm2d
from bnlab.training.build import TrainingContext
from tests.lab.studies.helpers import MakeExperiment, draw, unchanged


def planted(
    cosine: dict[str, float], relative: dict[str, float], top1: dict[str, float], scatter: float = 0
) -> Results:
    shift, accuracy = [], []
    for arm in ARMS:
        for seed in range(3):
            label = {"arm": arm, "learning_rate": EQUAL, "chosen": 1, "seed": seed}
            off = scatter * (seed - 1) * (arm == WITH_BN)
            for step in (5, 10):
                row = {"step": step, "layer": "a", "cosine": cosine[arm] + off, "relative": relative[arm]}
                shift.append(label | row)
            accuracy.append(
                label | {"step": 10, "test_top1": top1[arm], "guess": 0.1, "n_test": 500, "diverged_at": None}
            )
    return {"shift": shift, "accuracy": accuracy}


LESS = {WITHOUT_BN: 0.5, WITH_BN: 0.9, NOISY: 0.4}, {WITHOUT_BN: 1.0, WITH_BN: 0.3, NOISY: 1.2}
MORE = {WITHOUT_BN: 0.9, WITH_BN: 0.5, NOISY: 0.4}, {WITHOUT_BN: 0.3, WITH_BN: 1.0, NOISY: 1.2}
WORSE = {WITHOUT_BN: 0.5, WITH_BN: 0.9, NOISY: 0.5}
AS_WELL = {WITHOUT_BN: 0.5, WITH_BN: 0.9, NOISY: 0.95}


NOTHING = "in some seeds BN does not help, or noisy BN has no more shift than none: they show nothing"


def test_it_holds_where_bn_has_less_shift_and_added_shift_hurts() -> None:
    conclusion = conclude(planted(*LESS, WORSE))
    assert conclusion.verdict is Verdict.HOLDS
    assert NOTHING not in conclusion.remarks


@pytest.mark.parametrize(("shift", "top1"), [(MORE, WORSE), (LESS, AS_WELL)])
def test_it_does_not_hold_where_bn_has_more_shift_or_shift_does_no_harm(
    shift: tuple[dict[str, float], dict[str, float]], top1: dict[str, float]
) -> None:
    assert conclude(planted(*shift, top1)).verdict is Verdict.DOES_NOT_HOLD


def test_it_is_not_shown_where_seeds_disagree() -> None:
    assert conclude(planted(*LESS, WORSE, scatter=0.5)).verdict is Verdict.NOT_SHOWN


def test_noise_that_adds_no_shift_proves_nothing() -> None:
    cosine, relative = LESS
    conclusion = conclude(planted(cosine, relative | {NOISY: 0.2}, AS_WELL))
    assert conclusion.verdict is Verdict.NOT_SHOWN
    assert NOTHING in conclusion.remarks


def test_where_bn_does_not_help_nothing_explains_it() -> None:
    conclusion = conclude(planted(*LESS, {WITHOUT_BN: 0.9, WITH_BN: 0.91, NOISY: 0.9}))
    assert conclusion.verdict is Verdict.NOT_SHOWN
    assert NOTHING in conclusion.remarks


def test_an_arm_that_guesses_shows_nothing() -> None:
    conclusion = conclude(planted(*LESS, AS_WELL | {WITHOUT_BN: 0.12}))
    assert conclusion.verdict is Verdict.NOT_SHOWN
    assert any(remark.startswith("without BN: did no better than guess in 3 of 3") for remark in conclusion.remarks)


def test_compared_by_hand() -> None:
    found = compared(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]))
    assert found == {"gradient": 3, "distance": 5, "relative": 5 / 3, "cosine": 0}


def test_layers_are_spread_with_the_last_and_know_all_rows_before_them() -> None:
    network = build("bn_small_inception", classes=3, width=0.25)
    found = shifted_layers(network, 3)
    assert [name for name, _, _ in found] == ["inception2b", "inception3b", "inception4b"]
    assert found[0][1] is network.get_submodule("inception2b.branch1.conv").weight
    assert found[0][2] == {"conv1", "inception2a"}
    assert [name for name, _, _ in shifted_layers(build("mlp", classes=3), 9)] == ["hidden2", "hidden3"]


class Checked(Shift):
    """Works the shift of the last layer of an MLP out by the chain rule, in float64."""

    probe_steps, layers = 6, 1

    def before(self, step: int, context: TrainingContext) -> None:
        super().before(step, context)
        self.old = {name: p.detach().double().clone() for name, p in context.network.named_parameters()}

    def after(self, step: int, context: TrainingContext) -> None:
        network = context.network
        with unchanged(network):
            super().after(step, context)
        batch = study.batch_at(step, context)
        new = {name: p.detach().double() for name, p in network.named_parameters()}
        old, moved = (self._gradient(batch, self.old, earlier) for earlier in (self.old, new))
        row = self.results["shift"][-1]
        assert row["layer"] == "hidden3"
        for column, value in compared(old, moved).items():
            assert row[column] == pytest.approx(value, rel=1e-2)
        assert row["distance"] > 1e-4

    @staticmethod
    def _gradient(batch: Batch, weights: dict[str, torch.Tensor], earlier: dict[str, torch.Tensor]) -> torch.Tensor:
        x = F.adaptive_avg_pool2d(batch.images.double(), 28).flatten(1)
        for name in ("hidden1", "hidden2"):
            x = torch.sigmoid(x @ earlier[f"{name}.linear.weight"].T + earlier[f"{name}.linear.bias"])
        last = torch.sigmoid(x @ weights["hidden3.linear.weight"].T + weights["hidden3.linear.bias"])
        answers = torch.softmax(last @ weights["fc.weight"].T + weights["fc.bias"], 1)
        wrong = answers - F.one_hot(batch.targets.main, answers.shape[1])
        return ((wrong @ weights["fc.weight"]) * last * (1 - last)).T @ x / len(x)


def test_the_shift_is_that_of_the_definition_and_looking_changes_nothing(
    make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    experiment = make_experiment(learning_rate=1.0, schedule="constant", width=1.0)
    job = JobContext(split=experiment.splits.for_seed(0), folder=tmp_path, device="cpu", seed=0)
    probe = Checked()
    probed = train(job, experiment.recipe("mlp", size=28), probe=probe)
    assert len(probe.results["shift"]) == 6
    plain = train(job, experiment.recipe("mlp", size=28))
    for ours, theirs in zip(probed.context.network.parameters(), plain.context.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("noisy", [False, True])
def test_at_a_rate_of_next_to_0_only_new_noise_shifts(
    make_experiment: MakeExperiment, tmp_path: Path, noisy: bool
) -> None:
    experiment = make_experiment(learning_rate=1e-30, steps=1)
    job = JobContext(split=experiment.splits.for_seed(0), folder=tmp_path, device="cpu", seed=0)
    recipe = experiment.recipe("bn_mlp", size=28, activation="relu")
    trained = train(job, recipe, probe=Shift(), make=with_norm(NoisyBatchNorm) if noisy else None)
    assert not any(getattr(layer, "other", False) for layer in trained.context.network.modules())
    rows = trained.results["shift"]
    assert len(rows) == 2
    for row in rows:
        assert (number(row, "relative") > 0.05) == noisy
        assert (number(row, "cosine") < 0.99) == noisy


@pytest.mark.usefixtures("mlps")
def test_from_photos_to_plots(make_experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "RATES", (EQUAL,))
    results = study.measure(make_experiment(steps=4))
    assert len(results["shift"]) == 3 * 2 * 4 * 2  # arms, seeds, steps, layers
    assert max(numbers(results["shift"], "cosine")) <= 1
    conclusion = conclude(results)
    assert len(conclusion.plots) == 3
    draw(conclusion)


@pytest.mark.parametrize("relu", [False, True])
def test_noise_moves_each_channel_of_each_step_and_each_value_a_little(relu: bool) -> None:
    layer = NoisyBatchNorm(200)
    images = torch.randn(64, 200, 4, 4)
    torch.manual_seed(1)
    first = layer(images)
    second = layer(images)
    plain = BatchNorm2d(200)(images)
    residual = (first - plain).detach()
    means = residual.mean((0, 2, 3))  # 200
    assert -0.55 < means.min() < -0.4
    assert 0.4 < means.max() < 0.55
    scales = (first * plain).mean((0, 2, 3)) / plain.square().mean((0, 2, 3))
    assert 0.98 < scales.min() < 1.02
    assert 1.23 < scales.max() < 1.27
    within = first - means[:, None, None] - scales[:, None, None] * plain
    expected = (0.1**2 / 3 + 0.1**2) ** 0.5  # of a uniform of half-width 0.1, and of 0.1 times a normal y
    assert within.std().item() == pytest.approx(expected, rel=0.05)
    assert not torch.allclose(first.mean((0, 2, 3)), second.mean((0, 2, 3)), atol=0.1)
    torch.manual_seed(1)
    assert torch.equal(layer(images, relu=relu), first.relu() if relu else first)


def test_noise_is_drawn_anew_in_the_layers_before_alone() -> None:
    first, second = NoisyBatchNorm(4), NoisyBatchNorm(4)
    images, seen = torch.randn(8, 4, 2, 2), []
    for first.other, second.other in ((False, False), (True, False), (False, False)):
        torch.manual_seed(1)
        seen.append((first(images).detach(), second(images).detach()))
    assert not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[0][0], seen[2][0])


def test_other_noise_is_that_of_these_rows_alone() -> None:
    network = build("bn_mlp", classes=3, norm=NoisyBatchNorm)
    noisy = [layer for layer in network.modules() if isinstance(layer, NoisyBatchNorm)]
    set_other_noise(network, {"hidden1"})
    assert [layer.other for layer in noisy] == [True, False, False]
    set_other_noise(network, set())
    assert not any(layer.other for layer in noisy)


def test_inference_has_no_noise() -> None:
    layer = NoisyBatchNorm(3)
    images = torch.randn(8, 3, 2, 2)
    layer(images)
    plain = BatchNorm2d(3)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(images), plain.eval()(images))
    layer.statistics = "batch"
    assert torch.equal(layer(images), plain.train()(images))
