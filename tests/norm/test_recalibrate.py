"""Recalibration: what is measured, what is restored, which layers are skipped."""

import math
import pickle
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnlab import norm
from bnlab.norm import BatchNorm1d, BatchNorm2d, Whitening2d, convert_sync, recalibrate, reference
from bnlab.norm.layers import batch_norm_layers
from tests.norm import subclasses


class Pair(nn.Module):
    """Two normalised layers in sequence, and a third in parallel; float64, so that values can be compared exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.bn1 = BatchNorm2d(4)
        self.second = nn.Conv2d(4, 5, 3)
        self.bn2 = nn.BatchNorm2d(5)
        self.parallel = nn.Conv2d(3, 5, 5)
        self.bn3 = nn.BatchNorm2d(5)
        self.dropout = nn.Dropout(0.5)
        torch.manual_seed(3)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.first(self.dropout(x))))
        return self.bn2(self.second(y)) * self.bn3(self.parallel(x))


def images(count: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # From one image to the next the mean and spread differ, so that batches do too.
    spread = torch.linspace(0.5, 3, count, dtype=torch.float64)[:, None, None, None]
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64) * spread + spread


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name}


def normalised(bn: nn.Module, x: Tensor) -> Tensor:
    return reference.transform(x, bn.weight, bn.bias, bn.eps).y


def unbiased(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1).var(1)


def assert_holds(bn: nn.Module, x: Tensor) -> None:
    """Its statistics are those of x."""
    torch.testing.assert_close(bn.running_mean, x.mean((0, 2, 3)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(bn.running_var, unbiased(x), rtol=1e-10, atol=1e-10)


def test_layer_by_layer_measures_the_inputs_of_inference() -> None:
    model, x = Pair(), images()
    done = recalibrate(model, x.split(7), layer_by_layer=True)
    seen: dict[str, Tensor] = {}
    for name, layer in batch_norm_layers(model):
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        model.eval()(x)
    assert [*seen] == ["bn1", "bn2", "bn3"] == [*done.layers]
    for name, layer in batch_norm_layers(model):
        assert_holds(layer, seen[name])
    assert (done.passes, done.images, done.batches) == (4, 24, 4)


def test_one_pass_normalises_by_batches_and_merges_their_moments() -> None:
    model, x = Pair(), images()
    with torch.no_grad():
        inner = torch.cat([torch.relu(normalised(model.bn1, model.first(part))) for part in x.split(7)])
        inputs = {"bn1": model.first(x), "bn2": model.second(inner), "bn3": model.parallel(x)}
    done = recalibrate(model, x.split(7))
    for name, layer in batch_norm_layers(model):
        assert_holds(layer, inputs[name])
    assert done.passes == 1
    assert done.layers["bn1"].values == 24 * 6 * 6
    assert int(model.bn1.num_batches_tracked) == 4


def test_as_paper_is_algorithm_2() -> None:
    model, x = Pair(), images()
    with torch.no_grad():
        batches = [model.first(part) for part in x.split(6)]
    recalibrate(model, x.split(6), as_paper=True)
    paper = reference.population(batches)
    torch.testing.assert_close(model.bn1.running_mean, paper.mean)
    torch.testing.assert_close(model.bn1.running_var, paper.var)
    assert (model.bn1.running_var < unbiased(torch.cat(batches)) * 0.99).any()  # it ignores that means differ


@settings(max_examples=10)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans())
def test_the_batch_sizes_do_not_change_the_first_layers_statistics(sizes: list[int], by_layer: bool) -> None:
    x = images(sum(sizes))
    one, many = Pair(), Pair()
    recalibrate(one, [x], layer_by_layer=by_layer)
    recalibrate(many, x.split(sizes), layer_by_layer=by_layer)
    names = ("bn1", "bn2", "bn3") if by_layer else ("bn1", "bn3")
    for name in names:
        a, b = getattr(one, name), getattr(many, name)
        torch.testing.assert_close(a.running_mean, b.running_mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a.running_var, b.running_var, rtol=1e-9, atol=1e-9)


def test_how_far_off_the_statistics_were() -> None:
    bn = BatchNorm1d(2, eps=1e-12).double()
    bn.running_mean.copy_(torch.tensor([3.0, 0.0]))
    bn.running_var.copy_(torch.tensor([2.0, 10.0]))
    x = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)  # mean 0, unbiased variance 2
    measured = recalibrate(bn, [x]).layers[""]
    assert measured.mean_off == pytest.approx(3 / 2**0.5)
    assert measured.variance_off == pytest.approx(5)
    assert measured.off_share == 1
    assert recalibrate(bn, [x]).layers[""].variance_off == pytest.approx(1)


@pytest.mark.parametrize(
    ("mean", "variance", "share"),
    [(0.09, 2.4, 0.0), (0.2, 2.0, 0.5), (-0.2, 2.0, 0.5), (0.0, 2.6, 0.5), (0.0, 1.5, 0.5), (math.nan, 2.0, 0.5)],
)
def test_a_channel_is_off_by_its_mean_or_its_variance(mean: float, variance: float, share: float) -> None:
    bn = BatchNorm1d(2, eps=1e-12).double()
    bn.running_mean.copy_(torch.tensor([mean, 0.0]))
    bn.running_var.copy_(torch.tensor([variance, 2.0]))
    x = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)  # mean 0, unbiased variance 2
    assert recalibrate(bn, [x]).layers[""].off_share == share


def test_images_is_a_limit_that_the_last_batch_may_exceed() -> None:
    model, x = Pair(), images()
    done = recalibrate(model, x.split(7), images=10)
    assert (done.images, done.batches) == (14, 2)
    assert recalibrate(Pair(), x.split(7), images=14).images == 14
    with torch.no_grad():
        assert_holds(model.bn1, model.first(x[:14]))


def test_batches_as_loaders_yield_them() -> None:
    x = images()
    expected = Pair()
    recalibrate(expected, [x])
    labels = torch.zeros(24)
    for batch in ((x, labels), [x, labels], {"images": x, "labels": labels}):
        model = Pair()
        recalibrate(model, [batch])
        assert_same(statistics(model), statistics(expected))
    model = Pair()
    recalibrate(model, [{"labels": labels, "images": x}], forward=lambda network, batch: network(batch["images"]))
    assert_same(statistics(model), statistics(expected))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert [*a] == [*b]
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("mode", [False, True])
def test_everything_else_is_restored(by_layer: bool, mode: bool) -> None:
    model, x = Pair().train(mode), images()
    model.bn2.momentum = None
    model.dropout.train(not mode)
    model.bn1.statistics = "population"
    model.bn1.register_forward_hook(lambda *_: None)
    others = {name: tensor.clone() for name, tensor in model.state_dict().items() if "bn" not in name}
    flags = [(name, module.training) for name, module in model.named_modules()]
    attributes = [{**vars(module)} for module in model.modules()]
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    recalibrate(model, x.split(7), layer_by_layer=by_layer, forward=lambda net, batch: net(batch + torch.rand(1)))
    assert torch.equal(torch.rand(3), expected)
    assert [(name, module.training) for name, module in model.named_modules()] == flags
    assert [{**vars(module)}.keys() for module in model.modules()] == [a.keys() for a in attributes]
    assert (model.bn1.momentum, model.bn2.momentum) == (0.1, None)
    assert model.bn1.statistics == "population"
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules() if "Norm" in repr(type(m))] == [
        *(1, 0, 0)
    ]
    for name, tensor in others.items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert all(p.grad is None for p in model.parameters())


class Trouble(Exception):
    pass


def failing(after: int, error: type[BaseException]) -> Iterator[Tensor]:
    yield from images().split(4)[:after]
    raise error


class Failing:
    """Fails in its third pass, when a layer already has its new statistics."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return failing(2, self.error) if self.passes == 3 else iter(images().split(4))


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
@pytest.mark.parametrize("by_layer", [False, True])
def test_a_failure_changes_nothing(error: type[BaseException], by_layer: bool) -> None:
    model = Pair().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(error):
        recalibrate(model, Failing(error) if by_layer else failing(2, error), layer_by_layer=by_layer)
    assert_same(dict(model.state_dict()), before)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.bn2.track_running_stats
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("by_layer", [False, True])
def test_frozen_layers_are_skipped(by_layer: bool) -> None:
    model = Pair().train()
    model.bn1.freeze()
    model.bn3.eval()  # how torch.nn freezes a layer
    before = statistics(model)
    done = recalibrate(model, images().split(6), layer_by_layer=by_layer)
    assert done.skipped == {
        "bn1": "it is frozen",
        "bn3": "it is frozen: in evaluation, where other layers are in training",
    }
    assert [*done.layers] == ["bn2"]
    changed = {name for name, tensor in statistics(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {"bn2.running_mean", "bn2.running_var"}
    assert model.bn1.frozen and not model.bn1.training and model.bn2.training


class WithHead(nn.Module):
    """It runs its head in training alone, as GoogLeNet its auxiliary classifiers; the head is its first child."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.last, self.first = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.first(x)
        return (self.last(x), self.head(x)) if self.training else (self.last(x),)


def test_layers_without_running_statistics_and_layers_never_reached() -> None:
    done = recalibrate(WithHead(), [torch.randn(4, 3, 5, 5)])
    assert done.skipped == {"head": "no forward reaches it"}
    assert list(done.layers) == ["first", "last"]
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    assert recalibrate(model, [torch.randn(4, 3, 2, 2)]).skipped == {"0": "it keeps no running statistics"}


def test_a_network_without_layers_to_measure_is_not_run() -> None:
    done = recalibrate(nn.Linear(2, 2), iter([]))
    assert (done.images, done.passes, done.layers, done.skipped) == (0, 0, {}, {})


class Twice(nn.Module):
    """One layer that is used twice, the second time on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = BatchNorm2d(3)
        self.last = BatchNorm2d(3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.exp(self.bn(torch.exp(self.bn(x)))))


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_layer_used_more_than_once_has_the_statistics_of_all_its_uses(by_layer: bool) -> None:
    model, x = Twice(), images(8)
    done = recalibrate(model, [x], layer_by_layer=by_layer)
    both = torch.cat([x, torch.exp(normalised(model.bn, x))])
    assert_holds(model.bn, both)
    assert (done.layers["bn"].uses, done.layers["bn"].values) == (2, 2 * 8 * 64)
    assert done.layers["last"].uses == 1
    if by_layer:
        with torch.no_grad():
            y = torch.exp(model.eval().bn(torch.exp(model.bn(x))))
        assert_holds(model.last, y)


def test_whitening_layers_are_measured_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Whitening2d(4, groups=2)).double()
    x = images()
    recalibrate(model, x.split(7))
    with torch.no_grad():
        y = model[0](x).transpose(0, 1).flatten(1)  # 4 x values
    torch.testing.assert_close(model[1].running_mean, y.mean(1))
    torch.testing.assert_close(model[1].running_covariance, torch.stack([torch.cov(y[:2]), torch.cov(y[2:])]))


def test_population_statistics_are_valid_for_the_measured_weights_alone() -> None:
    model, x = nn.Sequential(BatchNorm2d(3, statistics="population")).double(), images()
    with pytest.raises(ValueError, match="has no population statistics"):
        model.eval()(x)
    recalibrate(model, [x])
    assert model(x).mean().abs() < 1e-10
    model.train()(x)
    with pytest.raises(ValueError, match=r"^0 \(BatchNorm2d\) has no population statistics for its present weights"):
        model.eval()(x)


def test_very_large_means() -> None:
    x = (torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.1 + 1e6).to(
        memory_format=torch.channels_last
    )
    model = nn.Sequential(nn.BatchNorm2d(3))
    recalibrate(model, x.split(16))
    exact = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[0].running_var.double(), exact.var(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"batches": []}, "no batch to measure: pass at least one"),
        ({"batches": [()]}, "a batch has tuple where its images should be: pass tensors"),
        ({"batches": [images()], "images": 0}, "images .* at least 1, not 0"),
        ({"batches": [torch.zeros(4, 3, 8, 8, dtype=torch.uint8)]}, "uint8 images: .*forward="),
    ],
)
def test_batches_that_are_refused(by_layer: bool, options: dict[str, object], complaint: str) -> None:
    model = Pair()
    before = statistics(model)
    with pytest.raises(ValueError, match=complaint):
        recalibrate(model, layer_by_layer=by_layer, **options)
    assert_same(statistics(model), before)


@pytest.mark.parametrize("by_layer", [False, True])
def test_values_that_are_not_finite(by_layer: bool) -> None:
    model = Pair()
    before = statistics(model)
    with pytest.raises(norm.NotFiniteError, match="not finite reach bn1: nothing was changed") as error:
        recalibrate(model, [images() * torch.nan], layer_by_layer=by_layer)
    assert error.value.layer == "bn1"
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    assert_same(statistics(model), before)


@pytest.mark.parametrize(("by_layer", "remedy"), [(False, "drop_last=True"), (True, "more images")])
def test_a_single_value_for_each_channel(by_layer: bool, remedy: str) -> None:
    model = Pair()
    before = statistics(model)
    with pytest.raises(norm.TooFewValuesError, match=rf"bn2.*{remedy}"):
        recalibrate(model, [images()[:1, :, :5, :5]], layer_by_layer=by_layer)
    assert_same(statistics(model), before)


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="choose layer_by_layer or as_paper"):
        recalibrate(Pair(), [images()], layer_by_layer=True, as_paper=True)
    with pytest.raises(ValueError, match=r"layer_by_layer .* many times: pass a list or a DataLoader"):
        recalibrate(Pair(), iter([images()]), layer_by_layer=True)
    with pytest.raises(ValueError, match=r"batches of one size, not of \[108, 252\] .*bn1.*drop_last=True"):
        recalibrate(Pair(), images().split(7), as_paper=True)


def test_statistics_that_do_not_fit() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3).half())
    before = statistics(model)
    with pytest.raises(ValueError, match=r"statistics of 0 do not fit into torch.float16: .*float32"):
        recalibrate(model, [images().half() * 1000])
    assert_same(statistics(model), before)


def test_layers_made_by_conversion_normalise_afterwards_as_before() -> None:
    """They take attributes from their class, which recalibration must not leave on them."""
    model, x = convert_sync(nn.Sequential(nn.BatchNorm2d(3))).model.double(), images()
    recalibrate(model, [x])
    assert model[0].statistics == "running"
    assert model.eval()(x[:1]).mean().abs() > 0.1  # by the batch it would be 0


def test_layer_by_layer_computes_no_more_than_it_needs() -> None:
    calls = []
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Identity()).double()
    model[2].register_forward_hook(lambda *_: calls.append(1))
    recalibrate(model, images().split(4), layer_by_layer=True)  # six batches
    assert len(calls) == 6  # only the first of three passes runs each forward to its end


class Branching(nn.Module):
    """The second layer's input depends on the first through a comparison; only large batches reach the third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.BatchNorm2d(3) for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.b((self.a(x) > 0.5).double())
        return self.c(y) if len(x) > 3 else y


@pytest.mark.parametrize("by_layer", [False, True])
def test_dependence_through_comparisons_and_layers_that_not_every_batch_reaches(by_layer: bool) -> None:
    model, x = Branching(), images(15)
    done = recalibrate(model, x.split([3, 12]), layer_by_layer=by_layer)
    assert [*done.layers] == ["a", "b", "c"] and not done.skipped
    assert (done.layers["c"].uses, done.layers["c"].values) == (1, 12 * 64)
    if by_layer:
        assert_holds(model.b, (reference.inference(
            x, model.a.weight, model.a.bias, model.a.running_mean, model.a.running_var, model.a.eps
        ) > 0.5).double())  # fmt: skip


@pytest.mark.parametrize("wrapped", [nn.Sequential, nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_a_wrapper_in_training_around_a_network_in_evaluation(wrapped: type[nn.Module]) -> None:
    model = wrapped(nn.Sequential(nn.BatchNorm2d(3)).double().eval())
    assert [*recalibrate(model, [images()]).layers] != []
    assert [module.training for module in model.modules()][-1] is False


def test_a_loader_that_shuffles_gives_the_same_images_in_every_pass() -> None:
    x = images(24)
    for generator in (None, torch.Generator().manual_seed(4)):
        loader = torch.utils.data.DataLoader(x, batch_size=4, shuffle=True, generator=generator)
        seen: list[Tensor] = []
        state, own = torch.get_rng_state(), None if generator is None else generator.get_state()
        model = Pair()
        done = recalibrate(
            model, loader, images=8, layer_by_layer=True, forward=lambda net, x, seen=seen: (seen.append(x), net(x))
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert generator is None or torch.equal(generator.get_state(), own)
        assert (done.images, len(seen)) == (8, 8)
        assert all(torch.equal(torch.cat(seen[i : i + 2]), torch.cat(seen[:2])) for i in range(0, 8, 2))


def test_batches_that_are_not_the_same_each_time() -> None:
    class Shrinking:
        left = 3

        def __iter__(self) -> Iterator[Tensor]:
            self.left -= 1
            return iter(images().split(4)[: self.left])

    with pytest.raises(ValueError, match=r"\[4, 4\] images, and then \[4\]: pass the same"):
        recalibrate(Pair(), Shrinking(), layer_by_layer=True)


class Merging(nn.BatchNorm2d):
    """A layer whose `eval()` does something that `train()` does not undo."""

    merged = 0

    def train(self, mode: bool = True) -> nn.Module:
        self.merged += 1
        return super().train(mode)


def test_train_and_eval_of_the_modules_are_not_called() -> None:
    layer = Merging(3).double()
    recalibrate(nn.Sequential(layer), [images()])
    assert layer.merged == 0 and layer.training


def test_an_error_while_storing_leaves_the_model_unchanged() -> None:
    model = Pair()
    with torch.inference_mode():
        model.bn3._buffers["running_mean"] = model.bn3.running_mean.clone()  # cannot be written to outside
    before = model.bn1.running_mean.clone()
    with pytest.raises(RuntimeError):
        recalibrate(model, [images()])
    assert torch.equal(model.bn1.running_mean, before)


def test_layers_whose_inference_uses_the_batch_are_skipped() -> None:
    model = nn.Sequential(BatchNorm2d(3, statistics="batch")).double()
    assert recalibrate(model, [images()]).skipped == {"0": "its inference is by the batch"}


def test_torchs_synchronised_layers_are_measured_by_each_process_itself() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(3)).double()
    recalibrate(model, [images()])
    assert_holds(model[0], images())
    assert model[0].training and model[0].running_mean is not None


def test_pythons_generator_is_not_changed() -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    recalibrate(Pair(), images().split(8))
    assert random.random() == expected


class Detector(nn.Module):
    """Its head gets what its neck finds, which may be nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.neck, self.head, self.other = BatchNorm2d(3), nn.BatchNorm2d(3), Whitening2d(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.neck(x)  # N x 3 x H x W
        return self.head(y[y.flatten(1).mean(1) > 0]), self.other(y[:0])


@pytest.mark.parametrize("options", [{}, {"layer_by_layer": True}, {"as_paper": True}], ids=str)
def test_empty_batches_are_left_out(options: dict[str, bool]) -> None:
    x = images().float()
    one, other = Detector(), Detector()
    batches = [x, x]
    done = recalibrate(one, [x[:0], *batches, x[:, :, :0]], **options)
    assert (done.images, done.batches) == (2 * len(x), 2)
    assert list(done.layers) == ["neck", "head"] and done.skipped == {"other": "it gets empty batches alone"}
    recalibrate(other, batches, **options)
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))
    assert all(b.isfinite().all() for b in one.buffers())
    with pytest.raises(ValueError, match="no batch to measure"):
        recalibrate(one, [x[:0]], **options)


class Masked(nn.BatchNorm2d):
    def forward(self, input: Tensor, mask: Tensor) -> Tensor:
        return super().forward(input * mask)


class WithMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = Masked(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x, torch.full_like(x, 3))


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("change", [lambda model: model, norm.convert, norm.convert_sync])
@pytest.mark.parametrize("make", [lambda: nn.Sequential(subclasses.Doubled(5)), WithMask])
def test_layers_that_normalise_something_else_than_their_input(make: Any, change: Any, by_layer: bool) -> None:
    """Both of them three times that: what they normalise is measured."""
    model, x = make().double(), torch.randn(12, 5, 4, 4, dtype=torch.float64) + 1
    change(model)
    done = recalibrate(model, x.split(4), layer_by_layer=by_layer)
    (layer,) = (module for _, module in batch_norm_layers(model))
    assert not done.skipped
    assert torch.allclose(layer.running_mean, 3 * x.mean((0, 2, 3)))
    assert torch.allclose(layer.running_var, 9 * x.transpose(0, 1).flatten(1).var(1))


def test_population_statistics_of_a_converted_layer_can_be_outdated() -> None:
    model, x = norm.convert(nn.Sequential(subclasses.Doubled(5))).model, torch.randn(12, 5, 4, 4)
    model[0].statistics = "population"
    recalibrate(model, [x])
    assert torch.allclose(model.eval()(x).mean((0, 2, 3)), torch.zeros(5), atol=1e-5)


def test_layers_that_normalise_several_times_are_skipped() -> None:
    done = recalibrate(nn.Sequential(subclasses.Twice(5), nn.BatchNorm2d(5)), [torch.randn(4, 5, 2, 2)])
    assert done.skipped == {"0": "the forward of Twice normalises several times, not once"}
    assert [*done.layers] == ["1"]
