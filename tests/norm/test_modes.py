import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from bnlab import norm

REFUSED = "{} has no population statistics for its present weights: norm.recalibrate(model, batches) measures them"


def batch(seed: int = 0) -> Tensor:
    return torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def layer(**settings: object) -> norm.BatchNorm2d:
    """With statistics that are neither a batch's nor the initial ones, and gamma and beta of its own."""
    made = norm.BatchNorm2d(3, **settings)
    torch.manual_seed(3)
    for tensor in (made.running_mean, made.weight, made.bias):
        if tensor is not None:
            nn.init.normal_(tensor)
    made(batch(9))
    return made


def state(of: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in of.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def by_stored(of: norm.BatchNorm2d, x: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, of.running_mean, of.running_var, of.weight, of.bias, eps=of.eps)


def by_batch(of: norm.BatchNorm2d, x: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, None, None, of.weight, of.bias, training=True, eps=of.eps)


@pytest.mark.parametrize("relu", [False, True])
def test_running_statistics_are_torchs(relu: bool) -> None:
    bn = layer()
    assert bn.statistics == "running"
    before = state(bn)
    y = by_batch(bn, batch())
    assert torch.equal(bn.train()(batch(), relu=relu), torch.relu(y) if relu else y)
    assert not same(state(bn), before)
    before = state(bn)
    y = by_stored(bn, batch())
    assert torch.equal(bn.eval()(batch(), relu=relu), torch.relu(y) if relu else y)
    assert same(state(bn), before)


@pytest.mark.parametrize("relu", [False, True])
def test_batch_statistics_in_inference_move_nothing(relu: bool) -> None:
    bn = layer(statistics="batch")
    assert bn.num_batches_tracked == 1  # training moves the running ones all the same
    bn.eval()
    before = state(bn)
    y = by_batch(bn, batch())
    assert torch.equal(bn(batch(), relu=relu), torch.relu(y) if relu else y)
    assert same(state(bn), before)


@pytest.mark.parametrize("relu", [False, True])
def test_population_statistics_are_left_alone_by_training_and_outdated_by_it(relu: bool) -> None:
    bn = layer()
    bn.statistics = "population"
    y = by_stored(bn, batch())
    assert torch.equal(bn.eval()(batch(), relu=relu), torch.relu(y) if relu else y)  # some batches were measured
    before = state(bn)
    y = by_batch(bn, batch())
    assert torch.equal(bn.train()(batch(), relu=relu), torch.relu(y) if relu else y)
    assert bn.num_batches_tracked == 0
    assert same(state(bn), before | {"num_batches_tracked": torch.tensor(0)})
    with pytest.raises(ValueError) as error:
        bn.eval()(batch())
    assert str(error.value) == REFUSED.format("BatchNorm2d")


def test_a_batch_that_is_not_finite_outdates_population_statistics_too() -> None:
    """The weights are about to change all the same."""
    bn = layer(statistics="population")
    bn.num_batches_tracked.fill_(4)
    bn.train()(batch() * torch.nan)
    assert bn.num_batches_tracked == 0


def test_the_refusal_names_the_layer() -> None:
    network = nn.Sequential()
    network.add_module("features", nn.Sequential(nn.Identity(), norm.BatchNorm2d(3, statistics="population")))
    with pytest.raises(ValueError) as error:
        network.eval()(batch())
    assert str(error.value) == REFUSED.format("features.1 (BatchNorm2d)")
    assert "\n" not in str(error.value)


def test_statistics_that_do_not_exist_are_refused() -> None:
    for do in (lambda: norm.BatchNorm2d(3, statistics="ema"), lambda: setattr(layer(), "statistics", "ema")):
        with pytest.raises(ValueError) as error:
            do()
        assert str(error.value) == "statistics is one of running, population, batch, not 'ema'"
    with pytest.raises(ValueError) as error:
        norm.BatchNorm2d(3, track_running_stats=False, statistics="population")
    assert str(error.value) == "population statistics need a layer with track_running_stats=True to hold them"
    bn = layer()
    with pytest.raises(ValueError):
        bn.statistics = "ema"
    assert bn.statistics == "running"


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("statistics", ["running", "population"])
def test_a_frozen_layer_normalises_by_what_is_stored_in_training_too(relu: bool, statistics: str) -> None:
    bn = layer()
    bn.statistics = statistics
    assert bn.freeze() is bn
    before = state(bn)
    for mode in (True, False, True):
        bn.train(mode)
        assert bn.frozen
        assert not bn.training
        y = by_stored(bn, batch())
        assert torch.equal(bn(batch(), relu=relu), torch.relu(y) if relu else y)
    assert same(state(bn), before)


@pytest.mark.parametrize("relu", [False, True])
def test_training_by_hand_does_not_thaw(relu: bool) -> None:
    bn = layer().freeze()
    before = state(bn)
    bn.training = True
    y = by_stored(bn, batch())
    assert torch.equal(bn(batch(), relu=relu), torch.relu(y) if relu else y)
    assert same(state(bn), before)


@pytest.mark.parametrize("frozen_in", [True, False])
@pytest.mark.parametrize("thawed_in", [True, False])
def test_unfreezing_returns_to_the_mode_asked_for_last(frozen_in: bool, thawed_in: bool) -> None:
    network = nn.Sequential(layer()).train(frozen_in)
    network[0].freeze()
    network.train(thawed_in)
    assert network[0].unfreeze() is network[0]
    assert not network[0].frozen
    assert network[0].training == thawed_in
    before = state(network)
    network(batch())
    assert same(state(network), before) != thawed_in
    assert layer().train(frozen_in).freeze().unfreeze().training == frozen_in


def test_gamma_and_beta_stop_and_go_on() -> None:
    bn = layer()
    bn.freeze()
    assert [p.requires_grad for p in bn.parameters()] == [False, False]
    bn.freeze()  # twice is as once
    bn.unfreeze()
    assert [p.requires_grad for p in bn.parameters()] == [True, True]
    bn.freeze(affine=False)
    assert [p.requires_grad for p in bn.parameters()] == [True, True]
    bn(batch()).square().sum().backward()
    assert bn.weight.grad.abs().min() > 0


def test_what_was_not_trained_before_is_not_afterwards() -> None:
    bn = layer()
    bn.bias.requires_grad_(False)
    bn.freeze().unfreeze()
    assert (bn.weight.requires_grad, bn.bias.requires_grad) == (True, False)
    bn.weight.requires_grad_(False)
    bn.freeze().unfreeze()
    assert (bn.weight.requires_grad, bn.bias.requires_grad) == (False, False)


@pytest.mark.parametrize("settings", [{"affine": False}, {"bias": False}], ids=str)
def test_layers_without_parameters_freeze_too(settings: dict[str, bool]) -> None:
    bn = layer(**settings).freeze()
    before = state(bn)
    assert torch.equal(bn(batch()), by_stored(bn, batch()))
    assert same(state(bn), before)
    assert all(p.requires_grad for p in bn.unfreeze().parameters())


def test_what_keeps_no_statistics_cannot_be_frozen() -> None:
    for bn in (norm.BatchNorm2d(3, track_running_stats=False), norm.BatchNorm2d(3)):
        bn.track_running_stats = False
        with pytest.raises(ValueError) as error:
            bn.freeze()
        assert str(error.value) == "BatchNorm2d cannot be frozen: it keeps no running statistics"
        assert not bn.frozen


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_modes_survive_a_copy(copied) -> None:
    frozen = copied(nn.Sequential(layer().freeze()))
    before = state(frozen)
    frozen.train()(batch())
    assert same(state(frozen), before)
    assert frozen[0].unfreeze().training
    assert all(p.requires_grad for p in frozen.parameters())
    for which in ("running", "population", "batch"):
        bn = layer(statistics=which, example_weight=0.25)
        again = copied(bn)
        assert (again.statistics, again.example_weight) == (which, 0.25)


def test_the_mode_shows() -> None:
    plain = "3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True"
    assert repr(layer(statistics="batch", example_weight=0.1).freeze()) == (
        f"BatchNorm2d({plain}, statistics='batch', example_weight=0.1, frozen)"
    )


def test_frozen_gradients_are_those_of_a_linear_function() -> None:
    """No term through the mean or the variance: dl/dx = gamma / sqrt(Var + eps) dl/dy."""
    bn, x = layer().double().freeze(affine=False), batch().double().requires_grad_()
    dy = batch(5).double()
    (dx,) = torch.autograd.grad(bn(x), x, dy)
    expected = (bn.weight / (bn.running_var + bn.eps).sqrt()).view(3, 1, 1) * dy
    assert (dx - expected).abs().max() < 1e-12


def test_a_mode_set_by_hand_is_what_unfreeze_goes_back_to() -> None:
    layer = norm.BatchNorm2d(3)
    layer.training = False
    assert not layer.freeze().unfreeze().training


@pytest.mark.parametrize("momentum", [0.1, None])
def test_layers_that_count_no_batches(momentum: float | None) -> None:
    own, plain = norm.BatchNorm2d(3, momentum=momentum), torch.nn.BatchNorm2d(3, momentum=momentum)
    x = torch.randn(4, 3, 5, 5) + 7
    for layer in (own, plain):
        layer.num_batches_tracked = None
        layer(x)
        layer.eval()
    assert torch.equal(own(x), plain(x))
    assert torch.equal(own.running_mean, plain.running_mean)
