"""Folding: the same outputs, and the right reason for each layer that is kept."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from bnlab import norm
from bnlab.nets import build
from bnlab.norm import BatchNorm1d, BatchNorm2d, GhostBatchNorm2d
from bnlab.norm.folding.fold import Folded, fold
from bnlab.norm.layers import batch_norm_layers

UNTRACED = "cannot be traced without an example"
CONTROL_FLOW = f"{UNTRACED}: 'TracedValue' object cannot be interpreted as an integer"


class Net(nn.Module):
    """A module with the given layers, and a function of the network and its input as its forward."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation, with random statistics and parameters as after a training."""
    torch.manual_seed(seed)
    for _, bn in batch_norm_layers(model):
        if bn.running_mean is not None:
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.02, 2)  # some small, so that eps matters
            bn.num_batches_tracked.fill_(1)
        bn.eps = 1e-2
        if bn.affine:
            nn.init.uniform_(bn.weight, -1.5, 1.5)
            nn.init.normal_(bn.bias)
    return model.eval()


def assert_folds(model: nn.Module, x: Tensor, layers: dict[str, tuple[str, ...]]) -> nn.Module:
    """Check that exactly these layers are folded, into these others, and that the outputs are the same."""
    folding = fold(randomised(model))
    assert folding.folded == layers
    torch.testing.assert_close(folding.model(x), model(x), rtol=1e-9, atol=1e-9)
    return folding.model


def assert_kept(model: nn.Module, reasons: dict[str, str]) -> None:
    folding = fold(randomised(model))
    assert folding.kept == reasons


def pair(run: Callable[[Any, Tensor], Any], **more: nn.Module) -> Net:
    return Net(run, **{"conv": nn.Conv2d(3, 3, 1), "bn": nn.BatchNorm2d(3), **more}).double()


def images() -> Tensor:
    return torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_every_layer_of_a_network_folds_but_those_of_auxiliary_heads() -> None:
    network = randomised(build("bn_googlenet", classes=5, auxiliary=True))
    for _, bn in batch_norm_layers(network):
        bn.running_var.clamp_(min=0.5)
    folding = fold(network)
    assert folding.kept == dict.fromkeys(["aux1.conv.bn", "aux2.conv.bn"], "inference never reaches it")
    assert len(folding.folded) == len(list(batch_norm_layers(network))) - 2 > 40
    assert type(folding.model) is type(network)
    assert {name for name, _ in batch_norm_layers(folding.model)} == set(folding.kept)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = network(x), folding.model(x)
    assert float((found - expected).abs().max() / expected.std()) < 1e-5


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (3, 4, 7)),
        (nn.Conv2d(4, 6, 3, bias=False, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (nn.Conv3d(4, 6, (1, 2, 3), stride=2), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (3, 4, 7)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (nn.ConvTranspose3d(4, 8, (1, 2, 3), groups=4), nn.BatchNorm3d(8), (2, 4, 3, 3, 3)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
        (nn.Linear(4, 6, bias=False), BatchNorm1d(6, statistics="population"), (3, 4)),
        (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False), (2, 4, 5, 5)),
        (nn.Conv2d(4, 6, 1), nn.SyncBatchNorm(6), (2, 4, 5, 5)),
        (nn.Conv2d(4, 6, 1), GhostBatchNorm2d(6, ghost_size=2), (2, 4, 5, 5)),
    ],
    ids=str,
)
def test_every_kind_of_layer(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(layer, norm, nn.ReLU(inplace=True)).double()
    assert_folds(model, torch.randn(shape, dtype=torch.float64), {"1": ("0",)})


def test_identities_and_dropout_are_passed_over() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.bn(F.dropout(net.drop(net.same(net.conv(x))), 0.5, net.training))

    assert_folds(pair(run, same=nn.Identity(), drop=nn.Dropout(0.3)), images(), {"bn": ("conv",)})


def test_bn_and_relu_in_one() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.bn(net.conv(x), relu=True) - net.bn2(net.conv2(x))

    model = pair(run, bn=BatchNorm2d(3), conv2=nn.Conv2d(3, 3, 1), bn2=BatchNorm2d(3))
    assert_folds(model, images(), {"bn": ("conv",), "bn2": ("conv2",)})


@pytest.mark.parametrize("dim", [1, -3])
def test_concatenations_fold_slice_by_slice(dim: int) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        inner = torch.cat((net.b(x), net.same(net.c(x))), dim=dim)
        return net.bn(input=torch.cat(tensors=[net.a(x), inner], dim=dim))

    layers = {"a": nn.Conv2d(3, 2, 1), "b": nn.ConvTranspose2d(3, 4, 1, groups=1), "c": nn.Conv2d(3, 3, 1, bias=False)}
    model = Net(run, **layers, same=nn.Identity(), bn=nn.BatchNorm2d(9)).double()
    assert_folds(model, images(), {"bn": ("a", "b", "c")})


def test_a_pair_that_is_called_twice() -> None:
    model = pair(lambda net, x: net.bn(net.conv(F.relu(net.bn(net.conv(x))))))
    assert_folds(model, images(), {"bn": ("conv",)})


def test_derived_layers_and_torchs_own_wrappers() -> None:
    class Derived(nn.Conv2d):
        """A subclass that computes the same."""

    model = Net(lambda net, x: net.wrapped(x), wrapped=nn.DataParallel(Block()))
    model.wrapped.module.conv = Derived(3, 3, 1)
    assert_folds(model.double(), images(), {"wrapped.module.bn": ("wrapped.module.conv",)})


def test_layers_under_two_names_and_in_a_plain_list() -> None:
    model = pair(lambda net, x: net.layers[0](net.conv(x)))
    model.layers, model.other_name = [model.bn], model.bn
    found = assert_folds(model, images(), {"bn": ("conv",)})
    assert isinstance(found.bn, Folded) and found.other_name is found.bn and found.layers[0] is found.bn


def test_weights_shared_with_another_convolution_are_kept_there() -> None:
    model = pair(lambda net, x: net.bn(net.conv(x)) + net.other(x), other=nn.Conv2d(3, 3, 1, dtype=torch.float64))
    model.other.weight, model.other.bias = model.conv.weight, model.conv.bias
    assert_folds(model, images(), {"bn": ("conv",)})


def test_the_model_itself_is_not_changed() -> None:
    model = randomised(pair(lambda net, x: net.bn(net.conv(x)) + torch.rand(1)))
    model.train()
    model.bn.eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    folding = fold(model)
    assert torch.equal(torch.rand(3), expected)  # torch's generator is restored
    assert type(folding.model) is Net and not any(m.training for m in folding.model.modules())
    assert isinstance(model.bn, nn.BatchNorm2d) and [m.training for m in model.modules()] == modes
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert vars(model).keys() == vars(folding.model).keys() == vars(Net(model.run)).keys()  # tracing adds no attributes


def test_memory_format_and_requires_grad_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)).to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    conv = fold(model).model[0]
    assert conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous()
    assert isinstance(conv.bias, nn.Parameter) and not conv.bias.requires_grad and not conv.weight.requires_grad
    assert all(p.requires_grad for p in fold(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))).model.parameters())


def test_weights_are_computed_in_float64_and_rounded_once() -> None:
    model = randomised(nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64)))
    exact = copy.deepcopy(model).double()
    scale = exact[1].weight / (exact[1].running_var + exact[1].eps).sqrt()
    found = fold(model).model[0]
    for width in (torch.float32, torch.float16):
        expected = (exact[0].weight * scale[:, None]).to(width)
        assert torch.equal(found.weight, expected) and found.bias.dtype == width
        exact[0].half().double()
        found = fold(nn.Sequential(model[0].half(), model[1])).model[0]


def test_a_linear_layer_before_folds_for_examples_alone() -> None:
    """Of N x L x C, batch normalisation takes L as the channels."""
    model = fold(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))).model
    assert model(torch.randn(3, 4)).shape == (3, 6)
    with pytest.raises(ValueError, match=r"^1 was folded into 0 for N x C, .*: run the model that was not folded"):
        model(torch.randn(3, 6, 4))
    assert repr(model[1]) == "Folded(into 0)"


def test_every_way_of_calling_counts() -> None:
    class Optional(Block):
        def forward(self, x: Tensor, skip: Tensor | None = None, twice: bool = False) -> Tensor:
            x = self.conv(x)
            skip = x if skip is None else skip
            return self.bn(x) + skip if twice else self.bn(x)

    assert_kept(Optional(), {"bn": "the output of conv (Conv2d) before it is also used elsewhere"})


def test_parts_of_a_model_that_cannot_be_traced_fold() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        x = net.called(x)
        for _ in range(x.shape[0]):
            x = x + 1
        for layer in net.stepped:
            x = layer(x)
        return net.bn(net.block(x))

    stepped = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Block())
    model = Net(run, called=copy.deepcopy(stepped), stepped=stepped, block=Block(), bn=nn.BatchNorm2d(3)).double()
    pairs = {"called.1": ("called.0",), "called.2.bn": ("called.2.conv",), "stepped.2.bn": ("stepped.2.conv",)}
    assert_folds(model, images(), {**pairs, "block.bn": ("block.conv",)})
    assert_kept(model, dict.fromkeys(["stepped.1", "bn"], f"the model {CONTROL_FLOW}"))


def test_layers_that_parts_have_in_common_are_kept() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        return [net.second(net.first(x)) for _ in range(x.shape[0])] + [net.third(x)]

    first, second, third = Block(), Block(), Block()
    second.conv, third.bn = first.conv, first.bn
    elsewhere = "is also used outside of {}, in a part that cannot be traced"
    assert_kept(
        Net(run, first=first, second=second, third=third),
        {
            "first.bn": f"it {elsewhere.format('first')}",
            "second.bn": f"first.conv (Conv2d) before it {elsewhere.format('second')}",
        },
    )


def hooked_pair(part: str) -> Net:
    model = pair(lambda net, x: net.bn(net.inner(x)), inner=nn.Sequential(nn.Conv2d(3, 3, 1)))
    model.get_submodule(part).register_forward_hook(lambda *_: pytest.fail("tracing runs no hook"))
    return model


class Own(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.relu(input))


class Scaled(nn.BatchNorm2d):
    def forward(self, input: Tensor, factor: int = 1) -> Tensor:
        return super().forward(input) * factor


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnConv(torch.ao.nn.qat.Conv2d):
    """A layer that looks to the tracer like one of torch's."""

    __module__ = "torch.nn.own"

    def __init__(self) -> None:
        nn.Conv2d.__init__(self, 3, 3, 1)


def replaced(model: nn.Module) -> nn.Module:
    model.forward = lambda x: x
    return model


class AnyArguments(Block):
    def forward(self, *args: Tensor) -> Tensor:
        return super().forward(*args)


class ManyArguments(Block):
    def forward(self, x: Tensor, a: int = 0, b: int = 0, c: int = 0, d: int = 0, e: int = 0) -> Tensor:
        return super().forward(x)


def stores(net: Any, x: Tensor) -> Tensor:
    net.stored = {"conv": [net.conv(x)]}
    return net.bn(net.stored["conv"][0])


CHAIN = "{} comes before it, not a convolution or linear layer"
CONV = "conv (Conv2d)"
BATCH = "it normalises by the batch's own statistics"
REASONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "its own forward": (
        lambda: pair(lambda n, x: n.bn(n.conv(x)), bn=Own(3)),
        "Own overrides forward, and its forward does not begin with batch normalisation by stored statistics",
    ),
    "batch statistics": (lambda: pair(lambda n, x: n.bn(n.conv(x)), bn=BatchNorm2d(3, statistics="batch")), BATCH),
    "no statistics": (
        lambda: pair(lambda n, x: n.bn(n.conv(x)), bn=nn.BatchNorm2d(3, track_running_stats=False)),
        BATCH,
    ),
    "example weighting": (
        lambda: pair(lambda n, x: n.bn(n.conv(x)), bn=BatchNorm2d(3, example_weight=0.1)),
        "it mixes each example's own statistics into those it keeps (example_weight)",
    ),
    "parametrised norm": (
        lambda: pair(lambda n, x: n.bn(n.conv(x)), bn=parametrizations.weight_norm(nn.BatchNorm2d(3), dim=None)),
        "its parameters are parametrised",
    ),
    "hook": (lambda: hooked_pair("bn"), "a hook is registered on it"),
    "never": (lambda: pair(lambda n, x: n.conv(x)), "inference never reaches it"),
    "read": (
        lambda: pair(lambda n, x: n.bn(n.conv(x)) + n.bn.running_var.sum()),
        "its parameters or statistics are also used elsewhere",
    ),
    "different layers": (
        lambda: pair(lambda n, x: n.bn(n.conv(x)) + n.bn(n.other(x)), other=nn.Conv2d(3, 3, 1)),
        "it is called after different layers",
    ),
    "layer called elsewhere": (
        lambda: pair(lambda n, x: n.bn(n.conv(x)) + n.conv(x + 1)),
        f"{CONV} before it is also called elsewhere",
    ),
    "layer twice in one": (
        lambda: pair(lambda n, x: n.bn(torch.cat([n.conv(x), n.conv(-x)], 1)), bn=nn.BatchNorm2d(6)),
        f"{CONV} before it is also called elsewhere",
    ),
    "the same output twice": (
        lambda: pair(lambda n, x: n.bn(torch.cat([n.conv(x)] * 2, 1)), bn=nn.BatchNorm2d(6)),
        f"{CONV} before it is also called elsewhere",
    ),
    "layer's own forward": (
        lambda: pair(lambda n, x: n.bn(n.conv(x)), conv=OwnConv()),
        "conv (OwnConv) before it overrides forward",
    ),
    "parametrised layer": (
        lambda: pair(lambda n, x: n.bn(n.conv(x)), conv=parametrizations.weight_norm(nn.Conv2d(3, 3, 1))),
        "the parameters of conv (ParametrizedConv2d) before it are parametrised",
    ),
    "hook on the layer": (lambda: hooked_pair("inner.0"), "a hook is registered on inner.0 (Conv2d) before it"),
    "hook on its container": (lambda: hooked_pair("inner"), "a hook reads the output of inner.0 (Conv2d) before it"),
    "layer read": (
        lambda: pair(lambda n, x: n.bn(n.conv(x)) + F.conv2d(x, n.conv.weight)),
        f"the parameters of {CONV} before it are also used elsewhere",
    ),
    "layer read past its attributes": (
        lambda: pair(lambda n, x: n.bn(n.conv(x)) + F.conv2d(x, next(n.conv.parameters()))),
        f"the parameters of {CONV} before it are also used elsewhere",
    ),
    "output used": (
        lambda: pair(lambda n, x: (h := n.conv(x)) + n.bn(h)),
        f"the output of {CONV} before it is also used elsewhere",
    ),
    "output stored": (lambda: pair(stores), f"the output of {CONV} before it is also used elsewhere"),
    "output of concatenation used": (
        lambda: pair(lambda n, x: (h := torch.cat([n.conv(x)], 1)) + n.bn(h)),
        "the output of cat() before it is also used elsewhere",
    ),
    "activation": (
        lambda: pair(lambda n, x: n.bn(n.relu(n.conv(x))), relu=nn.ReLU()),
        CHAIN.format("relu (ReLU)"),
    ),
    "replaced identity": (
        lambda: pair(lambda n, x: n.bn(n.same(n.conv(x))), same=replaced(nn.Identity())),
        CHAIN.format("same (Identity)"),
    ),
    "addition": (lambda: pair(lambda n, x: n.bn(n.conv(x) + x)), CHAIN.format("add()")),
    "input": (lambda: pair(lambda n, x: n.bn(x)), CHAIN.format("the input of the model")),
    "constant": (lambda: pair(lambda n, x: x + n.bn(2.0)), CHAIN.format("a constant")),
    "branch on a shape": (
        lambda: pair(lambda n, x: n.bn(n.conv(x)) if x.shape[0] > 1 else n.conv(x)),
        f"{CONV} before it is also called elsewhere",
    ),
    "another argument": (
        lambda: pair(lambda n, x: n.bn(n.conv(x), 2), bn=Scaled(3)),
        "Scaled overrides forward, and is called with other arguments than its input",
    ),
    "own forward of the layer": (
        lambda: pair(lambda n, x: n.bn(n.conv(x)), conv=Doubled(3, 3, 1)),
        "conv (Doubled) before it overrides forward",
    ),
    "different shapes": (
        lambda: pair(
            lambda n, x: n.bn(torch.cat([n.conv(x), n.conv2(x).transpose(1, 2)], 1)),
            conv2=nn.Linear(5, 3),
            bn=nn.BatchNorm2d(6),
        ),
        "a concatenation of different shapes comes before it",
    ),
    "active dropout": (lambda: pair(lambda n, x: n.bn(F.dropout(n.conv(x)))), CHAIN.format("dropout()")),
    "part of a concatenation": (
        lambda: pair(lambda n, x: n.bn(torch.cat([n.conv(x), x], 1)), bn=nn.BatchNorm2d(6)),
        CHAIN.format("the input of the model"),
    ),
    "along the rows": (
        lambda: pair(lambda n, x: n.bn(torch.cat([n.conv(x)], -2))),
        "a concatenation along dimension -2, not along the channels, comes before it",
    ),
    "channels": (
        lambda: pair(lambda n, x: n.bn(n.conv(x)), bn=nn.BatchNorm2d(4)),
        "it is for 4 channels, and the layers before it have 3",
    ),
    "linear": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm2d(3)),
        "it is for images, in which the features of a linear layer are not the channels",
    ),
    "forward replaced": (lambda: replaced(Block()), f"the model {UNTRACED}: its forward was replaced"),
    "any arguments": (AnyArguments, f"the model {UNTRACED}: its forward takes any number of arguments"),
    "five optional": (
        ManyArguments,
        f"the model {UNTRACED}: its forward has more than four optional arguments",
    ),
    "model itself": (lambda: nn.Sequential(nn.BatchNorm2d(3))[0], "it is the model itself"),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons(case: str) -> None:
    make, reason = REASONS[case]
    folding = fold(randomised(make()))
    assert list(folding.kept.values()) == [reason]
    assert not folding.folded and len(list(batch_norm_layers(folding.model))) == 1


def test_layers_without_population_statistics_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNorm2d(3, statistics="population"))
    assert fold(model).kept == {"1": "it has no population statistics for its present weights"}


def test_layers_that_are_not_finite_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, eps=0))
    model[1].running_var[1] = 0
    assert fold(model).kept == {"1": "its scale or shift is not finite"}


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_layers_whose_weights_would_overflow_are_kept(part: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False).half(), nn.BatchNorm2d(3))
    getattr(model[1], part).data.fill_(1e7)
    folding = fold(model)
    assert folding.kept == {"1": "the weights of 0 would not be finite in torch.float16"}
    assert torch.equal(folding.model[0].weight, model[0].weight) and folding.model[0].bias is None


def test_functions_of_what_is_not_stored_are_kept() -> None:
    model = pair(lambda n, x: F.batch_norm(n.other(n.bn(n.conv(x))), torch.zeros(3), torch.ones(3)),
                 other=nn.Conv2d(3, 3, 1))  # fmt: skip
    name = "F.batch_norm (batch_norm in the model)"
    assert fold(model).kept == {
        name: "it is a function whose parameters and statistics are not all stored in the model"
    }


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.gamma, self.beta = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = F.relu(F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, eps=1e-3))
        return torch.batch_norm(self.conv2(x), None, self.beta, self.mean, self.var, False, 0.1, 1e-5, False)


def test_a_module_that_convolves_and_keeps_statistics_folds() -> None:
    class ConvNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.register_buffer("running_mean", torch.randn(3))
            self.register_buffer("running_var", torch.rand(3) + 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(input=self.conv(x), running_mean=self.running_mean, running_var=self.running_var).relu()

    name = "F.batch_norm (batch_norm in the model)"
    assert_folds(nn.Sequential(ConvNorm()).double(), images(), {name: ("0.conv",)})


@pytest.mark.parametrize("inside", [False, True])
def test_functions_fold(inside: bool) -> None:
    model: nn.Module = Functional().double()
    hooked: list[str] = []
    model.register_forward_hook(lambda *_: hooked.append("owner"))
    if inside:
        model = nn.Sequential(model, nn.Flatten())
    folding = fold(model)
    assert sorted(folding.folded.values()) == [("0.conv",), ("0.conv2",)] if inside else [("conv",), ("conv2",)]
    assert not folding.kept
    torch.testing.assert_close(folding.model(images()), model.eval()(images()), rtol=1e-9, atol=1e-9)
    assert len(hooked) == 2
    assert "torch.batch_norm" not in str(getattr(folding.model[0] if inside else folding.model, "code", "none"))


def test_functions_in_training_or_of_a_forward_that_branches_are_kept() -> None:
    class Branch(Functional):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return F.batch_norm(x, self.mean, self.var) if x.shape[0] > 1 else x

    class Training(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), self.mean, self.var, training=True)

    for model in (Branch(), Training()):
        folding = fold(model)
        assert not folding.folded and len(folding.kept) == 1


def test_an_example_reveals_what_no_graph_shows() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        h = net.conv(x)
        y = net.bn(h)
        return y + h if isinstance(h, Tensor) else y  # false while tracing

    model = randomised(Net(run, conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3)))
    with pytest.raises(ValueError, match=r"output differs by [0-9.]+ of its standard deviation"):
        fold(model, torch.randn(4, 3, 6, 6))
    sound = randomised(Block())
    assert fold(sound, (torch.randn(4, 3, 6, 6),)).folded == {"bn": ("conv",)}


def test_attributes_of_a_folded_layer_are_kept() -> None:
    model = randomised(Net(lambda net, x: net.bn(net.conv(x)) / net.bn.num_features, conv=nn.Conv2d(3, 3, 1),
                           bn=nn.BatchNorm2d(3)))  # fmt: skip
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(fold(model, x).model(x), model(x))


def test_a_folded_model_can_be_scripted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit's own
        model, x = fold(randomised(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))).model, torch.randn(2, 3, 4, 4)
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_the_network_within_a_wrapper_is_folded() -> None:
    folding = fold(nn.DataParallel(randomised(Block())))
    assert isinstance(folding.model, Block) and folding.folded == {"bn": ("conv",)}


class Loop(Block):
    """Its forward runs over the positions, which only an example shows."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for _ in range(x.shape[2]):
            x = x + 0
        return self.bn(self.conv2(x)) if hasattr(self, "conv2") else self.bn(x)


def test_an_example_shows_what_cannot_be_traced() -> None:
    model = Loop()
    model.conv2 = nn.Conv2d(3, 3, 1)
    randomised(model.double())
    assert fold(model).kept == {"bn": f"the model {CONTROL_FLOW}"}
    folding = fold(model, images())
    assert (folding.folded, folding.kept) == ({"bn": ("conv2",)}, {})
    torch.testing.assert_close(folding.model(images()), model(images()), rtol=1e-9, atol=1e-9)


def test_an_example_shows_what_lies_between_parts() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(x))

    class Stem(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.conv, self.again = nn.Conv2d(3, 3, 1), again

        def forward(self, x: Tensor, other: bool = False) -> Tensor:
            x = self.conv(x)
            return x * 2 if other and self.again else x

    def run(net: Any, x: Tensor) -> Tensor:
        return torch.stack([net.head(net.stem(one[None])) for one in x])

    model = randomised(Net(run, stem=Stem(False), head=Head()).double())
    assert fold(model).kept == {"head.bn": "the input of head comes before it, not a convolution or linear layer"}
    assert fold(model, images()).folded == {"head.bn": ("stem.conv",)}
    model = randomised(Net(run, stem=Stem(True), head=Head()).double())
    reason = "stem may use stem.conv (Conv2d) otherwise, for other inputs"
    assert fold(model, images()).kept == {"head.bn": reason}


def test_features_that_are_not_the_channels_are_kept_if_an_example_shows_them() -> None:
    model = randomised(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6)))
    x = torch.randn(3, 6, 4)
    folding = fold(model, x)
    assert folding.folded == {"3": ("2",)}
    assert folding.kept == {"1": "its input has 3 dimensions, in which its channels are not those of 0"}
    torch.testing.assert_close(folding.model(x), model(x))


def test_a_layer_before_a_convolution_or_linear_layer_folds_into_it() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(54),
        nn.Dropout(0.5), nn.Linear(54, 3),
    ).double()  # fmt: skip
    assert_folds(model, torch.randn(2, 4, 5, 5, dtype=torch.float64), {"0": ("1",), "4": ("6",)})
    reflected = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    both = nn.Sequential(nn.BatchNorm2d(4), reflected, nn.BatchNorm2d(4)).double()
    assert_folds(both, torch.randn(2, 4, 5, 5, dtype=torch.float64), {"0": ("1",), "2": ("1",)})
    assert_kept(
        nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)),  # zeros are not normalised
        {"0": "the input of the model comes before it, not a convolution or linear layer"},
    )


class Rectified(nn.BatchNorm2d):
    """Computes the arguments of batch_norm itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training))


class Squashed(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sigmoid()


class SquashedSync(nn.SyncBatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sigmoid()


class SquashedOurs(BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sigmoid()


class RectifiedOurs(BatchNorm2d):
    def forward(self, input: Tensor, *, relu: bool = True) -> Tensor:
        return super().forward(input, relu=relu)


CHANGES = {
    "": (),
    "convert": (norm.convert,),
    "convert_sync": (norm.convert_sync,),
    "both": (norm.convert, norm.convert_sync),
    "frozen": (norm.freeze,),
    "converted, frozen": (norm.convert, norm.freeze),
    "frozen, synchronised": (norm.freeze, norm.convert_sync),
    "converted and back": (norm.convert, norm.freeze, norm.unfreeze, norm.revert),
}


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize(
    "kind", [nn.BatchNorm2d, Rectified, Squashed, SquashedSync, SquashedOurs, GhostBatchNorm2d, nn.SyncBatchNorm]
)
def test_converted_and_frozen_layers(kind: type[nn.Module], changes: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4)).double()
    nn.init.uniform_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.1, 2)
    for change in CHANGES[changes]:
        change(model)
    model.eval()
    folding, x = fold(model), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert (folding.folded, folding.kept) == ({"1": ("0",)}, {})
    with torch.no_grad():
        expected = model(x)
        for one in (folding.model, copy.deepcopy(folding.model), pickle.loads(pickle.dumps(folding.model))):
            assert torch.allclose(one(x), expected, rtol=0, atol=1e-12)


def test_a_layer_of_ours_that_is_always_called_with_relu() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), RectifiedOurs(4)).eval()
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        assert torch.allclose(fold(model).model(x), model(x), atol=1e-6)


@pytest.mark.parametrize("attribute", ["statistics", "example_weight"])
def test_converted_layers_that_do_not_normalise_by_stored_statistics_alone(attribute: str) -> None:
    model = norm.convert(nn.Sequential(nn.Conv2d(3, 4, 3), Squashed(4)).eval()).model
    setattr(model[1], attribute, {"statistics": "population", "example_weight": 0.1}[attribute])
    assert not fold(model).folded
    if attribute == "statistics":
        model[1].num_batches_tracked.fill_(1)  # measured
        assert fold(model).folded


@pytest.mark.parametrize("ours", [False, True])
def test_synchronised_layers_with_a_process_group(ours: bool) -> None:
    """There can be no copy of a group."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = torch.distributed.new_group([0])
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
        convert = norm.convert_sync if ours else nn.SyncBatchNorm.convert_sync_batchnorm
        convert(model, process_group=group)
        model = model if ours else convert(model, process_group=group)
        x = torch.randn(2, 3, 6, 6)
        folding = fold(model, x)
        assert folding.folded == {"1": ("0",)}
        assert folding.model[3].process_group is group
        assert not hasattr(folding.model[1], "process_group")
        assert torch.allclose(folding.model(x), model(x), atol=1e-6)
        pickle.dumps(folding.model[:3])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the old weight_norm
@pytest.mark.parametrize("change", [nn.utils.weight_norm, lambda conv: prune.random_unstructured(conv, "weight", 0.5)])
def test_computed_weights(change: Callable[[nn.Module], nn.Module]) -> None:
    """They have a history in autograd, and torch does not copy such tensors."""
    model = nn.Sequential(
        change(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )
    x = torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    folding = fold(model.eval(), x)
    assert folding.folded == {"4": ("3",)}
    assert folding.kept == {"1": "the parameters of 0 (Conv2d) before it are parametrised"}
    assert torch.allclose(folding.model(x), model(x), atol=1e-5)


class InPlaceBetween(nn.Module):
    """The layer after batch normalisation would read its input, which has changed by then."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.bn, self.conv, self.change = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), change

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        self.change(x)
        return self.conv(y)


def _add(x: Tensor) -> None:
    x += 1  # which torch.fx takes for an addition


@pytest.mark.parametrize(
    "change", [lambda x: x.mul_(2), _add, lambda x: F.relu(x, inplace=True), nn.ReLU(inplace=True)]
)
def test_an_input_that_changes_before_the_layer_after_it(change: Callable[[Tensor], object]) -> None:
    model, x = InPlaceBetween(change).eval(), torch.randn(2, 3, 4, 4)
    folding = fold(model)
    assert not folding.folded
    assert torch.equal(folding.model(x.clone()), model(x.clone()))


def test_parameters_that_forward_finds_by_itself() -> None:
    class Penalised(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + sum(p.square().sum() for p in self[0].parameters())

    folding = fold(Penalised(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    assert folding.kept == {"1": "the parameters of 0 (Conv2d) before it are also used elsewhere"}

    class Placed(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.to(next(self.parameters()).device))

    assert fold(Placed(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()).folded


def test_a_layer_that_overrides_call_is_kept() -> None:
    class Called(nn.BatchNorm2d):
        def __call__(self, input: Tensor) -> Tensor:
            return super().__call__(input) * 2

    folding = fold(nn.Sequential(nn.Conv2d(3, 4, 3), Called(4)).eval())
    assert folding.kept == {"1": "Called overrides __call__"}


def test_hooks_on_all_modules() -> None:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: output * 2 if isinstance(module, nn.Conv2d) else None
    )
    try:
        folding = fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    finally:
        handle.remove()
    assert folding.kept == {"1": "a hook is registered on it"}
