"""The diagnosis as a whole: what it restores, what it takes, and what it says of models without batch normalisation."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnlab.errors import UsageError
from bnlab.health import diagnose
from bnlab.norm import recalibrate
from tests.health.test_restore import snapshot


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()  # fmt: skip


def images(n: int = 256, size: int = 12) -> Tensor:
    torch.manual_seed(1)
    return 3 * torch.randn(n, 3, size, size) + 6 * torch.randn(n, 3, 1, 1)


@pytest.fixture
def sound() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """A network whose statistics are those of the images, and images that it classifies correctly."""
    model, x = network(), images()
    recalibrate(model, [*x.split(32)])
    return model, [*zip(x.split(32), model(x).argmax(1).split(32), strict=True)]


def test_a_sound_network_has_no_findings(sound: tuple[nn.Sequential, list[Any]]) -> None:
    report = diagnose(*sound)
    assert [f.id for f in report.findings if f.severity != "info"] == []
    assert report.accuracy["running"] == 1.0
    assert report.accuracy["recalibrated"] == 1.0
    assert report.images == 256


def test_stale_statistics_are_found_with_their_cost(sound: tuple[nn.Sequential, list[Any]]) -> None:
    model, batches = sound
    model[1].running_mean.mul_(0.2)
    model[1].running_var.mul_(0.2).add_(0.8)
    report = diagnose(model, batches)
    finding = report["BN102"]
    assert finding.layers == ("1",)
    assert finding.severity == "warn"
    assert finding.cost is not None
    assert finding.cost.before == report.accuracy["running"]
    assert finding.cost.after == 1.0
    assert finding.cost.gain > 0.05
    assert finding.numbers["initial_weight"] == pytest.approx(0.8, abs=0.01)
    assert ("BN101" in report) == (report.accuracy["batch"] > report.accuracy["running"] + 0.05)  # type: ignore[operator]


class Failing(list[Any]):
    """Batches, of which one raises."""

    def __init__(self, batches: list[Any], error: type[BaseException]) -> None:
        super().__init__(batches)
        self.error = error

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(super().__iter__()):
            if i == 4:
                raise self.error
            yield batch


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("training", [True, False])
def test_everything_is_restored(
    sound: tuple[nn.Sequential, list[Any]], error: type[BaseException] | None, training: bool
) -> None:
    model, batches = sound
    model.train(training)
    model[1].register_forward_hook(lambda *_: None)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    before = str(snapshot(model, optimizer))
    given = batches if error is None else Failing(batches, error)
    if error is None:
        diagnose(model, given, optimizer=optimizer)
    else:
        with pytest.raises(error):
            diagnose(model, given, optimizer=optimizer)
    assert str(snapshot(model, optimizer)) == before


def test_a_loader_that_shuffles_continues_as_if_nothing_had_happened(sound: tuple[nn.Sequential, list[Any]]) -> None:
    model, batches = sound
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(x, y), 32, shuffle=True, generator=generator)
    expected = copy.deepcopy(generator).get_state() if hasattr(generator, "__deepcopy__") else generator.get_state()
    report = diagnose(model, loader)
    assert report.accuracy["running"] == 1.0
    assert torch.equal(generator.get_state(), expected)


def test_batches_sorted_by_class_are_named_and_their_gap_is_not(sound: tuple[nn.Sequential, list[Any]]) -> None:
    model, batches = sound
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    order = y.argsort()
    report = diagnose(model, [*zip(x[order].split(32), y[order].split(32), strict=True)])
    assert report.evidence.sorted_by_class
    assert "BN101" not in report


class GroupNormed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_model_without_batch_normalisation_says_so() -> None:
    for model, text in ((GroupNormed(), "its 1 GroupNorm keep no statistics"), (nn.Flatten(), "no layer that keeps")):
        report = diagnose(model.eval(), [images(8)])
        assert any(text in note for note in report.notes)
        assert not report.at_or_above("warn")


def test_a_layer_that_is_never_reached_is_named() -> None:
    model = network()
    model.spare = nn.BatchNorm2d(3)
    model.forward = nn.Sequential(*list(model.children())[:-1]).forward  # type: ignore[method-assign]
    report = diagnose(model, [images(32)])
    assert any("never reached by the forward: spare" in note for note in report.notes)


def traced(model: nn.Module) -> nn.Module:
    return torch.jit.trace(model, images(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [torch.jit.script, traced])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_scripted_or_traced_model_says_what_was_checked(make: Any, sound: tuple[nn.Sequential, list[Any]]) -> None:
    model, batches = sound
    report = diagnose(make(model), batches)
    assert report.accuracy["running"] == 1.0
    assert any("does not show its layers" in note for note in report.notes)


def test_a_wrapped_model_is_unwrapped(sound: tuple[nn.Sequential, list[Any]]) -> None:
    model, batches = sound
    report = diagnose(nn.DataParallel(model), batches)
    assert [*report.evidence.layers] == ["1"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype, sound: tuple[nn.Sequential, list[Any]]) -> None:
    model, batches = sound
    report = diagnose(model.to(dtype), [(x.to(dtype), y) for x, y in batches])
    assert (report.accuracy["running"] or 0) > 0.95
    assert not report.at_or_above("warn")


def test_a_metric_replaces_accuracy() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).eval()
    torch.manual_seed(0)
    x = torch.randn(256, 5)
    recalibrate(model, [*x.split(32)])
    y = model(x).detach()
    model[1].running_mean.add_(2)
    batches = [*zip(x.split(32), y.split(32), strict=True)]
    report = diagnose(model, batches, metric=lambda output, batch: -(output - batch[1]).square().mean(1))
    assert not report.is_accuracy
    assert report.accuracy["recalibrated"] == pytest.approx(0, abs=1e-6)
    assert report["stale-statistics"].cost is not None


def test_a_metric_of_batches_counts_batches(sound: tuple[nn.Sequential, list[Any]]) -> None:
    model, batches = sound
    model[1].running_mean.add_(4)
    report = diagnose(model, batches, metric=lambda y, batch: float((y.argmax(1) == batch[1]).double().mean()))
    cost = report["stale-statistics"].cost
    assert cost is not None
    assert (cost.n, cost.kind) == (8, "metric of batches")
    assert " on 8 batches (" in str(report)


def test_a_gap_that_few_images_do_not_show_is_noted(sound: tuple[nn.Sequential, list[Any]]) -> None:
    model, batches = sound
    few = [x[:4] for x, _ in batches[:3]]
    recalibrate(model, few)
    labelled = [(x, model(x).argmax(1)) for x in few]
    for _ in range(40):  # until an image or two get another class
        model[1].running_mean.add_(0.25)
        report = diagnose(model, labelled, select=["BN101", "BN102"])
        if report.accuracy["running"] != 1:
            break
    assert report.accuracy["recalibrated"] == 1
    assert report.findings == ()
    (note,) = report.notes
    assert note.startswith("recalibrated statistics give ")
    assert note.endswith(", which may be chance: more images would decide")
    assert "pass two batches or more" in diagnose(model, batches[:1]).notes[-1]


def test_what_cannot_be_run_is_one_line(sound: tuple[nn.Sequential, list[Any]]) -> None:
    with pytest.raises(UsageError, match=r"the model cannot be run on 4 images of the shape \[5, 12, 12\]"):
        diagnose(sound[0], [torch.zeros(8, 5, 12, 12)])
    with pytest.raises(UsageError, match="images=0"):
        diagnose(*sound, images=0)
    for constants in ({"mean": [0.5, 0.5]}, {"std": [0.2, 0.0, 0.2]}, {"std": [float("nan")] * 3}):
        with pytest.raises(UsageError, match=r"(mean|std)=\[.*: pass three"):
            diagnose(*sound, **constants)
    with pytest.raises(UsageError, match="there is no check 'BN999'"):
        diagnose(*sound, select=["BN999"])
    with pytest.raises(TypeError, match=r"must be the model, an nn\.Module, not str"):
        diagnose("model", [])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="lazy layers"):
        diagnose(nn.LazyBatchNorm2d(), [images(8)])


def test_checks_can_be_selected_and_ignored(sound: tuple[nn.Sequential, list[Any]]) -> None:
    model, batches = sound
    model[1].running_mean.add_(3)
    assert {f.id for f in diagnose(model, batches, select=["stale-statistics"]).findings} == {"BN102"}
    assert "BN102" not in diagnose(model, batches, ignore=["BN102"])


def test_a_compiled_part_runs_as_it_was_written(sound: tuple[nn.Sequential, list[Any]]) -> None:
    """Its hooks would be compiled too, again and again, since they read what changes from one batch to the next."""
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model, batches = sound
    model[1] = torch.compile(model[1], backend=backend)
    report = diagnose(model, batches)
    assert report.findings == ()
    assert set(report.evidence.layers) == {"1._orig_mod"}
    assert compiled == []
    with torch.no_grad():
        model(batches[0][0])
    assert compiled


@pytest.mark.slow
def test_nothing_imports_the_compiler_if_nothing_is_compiled() -> None:
    code = (
        "import sys, torch; from torch import nn; from bnlab.health import diagnose;"
        "model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval();"
        "diagnose(model, [torch.randn(8, 3, 8, 8)] * 8); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
