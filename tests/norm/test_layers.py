"""The layers against torch's own, the reference and ONNX; then freezing, statistics modes and example weighting."""

import copy
import io
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.backend.test.case import node as onnx_cases
from onnx.backend.test.case.node import batch_normalization
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from bnlab import norm
from bnlab.norm import reference
from bnlab.norm.layers import batch_norm_layers, is_plain, normalise_with_own_statistics

LAYERS = pytest.mark.parametrize("n", [1, 2, 3])
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
RELU = pytest.mark.parametrize("relu", [False, True])
SHAPES = {1: (6, 3, 5), 2: (4, 3, 5, 4), 3: (2, 3, 3, 4, 2)}
HALVES = (torch.bfloat16, torch.float16)


def values(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype) * 2 + 1


def equal(ones: Any, others: Any) -> bool:
    """Equal to the bit, where NaN equals NaN."""
    ones, others = list(ones), list(others)
    assert len(ones) == len(others)
    return all(torch.equal(one.nan_to_num(1e9), other.nan_to_num(1e9)) for one, other in zip(ones, others, strict=True))


# Every option and every number of dimensions, against torch's layer.


class Case(NamedTuple):
    """A layer's constructor, and the shape of its input."""

    n: int
    shape: tuple[int, ...]
    options: dict[str, Any]

    def layer(self, dtype: torch.dtype = torch.float64, module: Any = norm) -> nn.Module:
        layer = getattr(module, f"BatchNorm{self.n}d")(self.shape[1], **self.options).to(dtype)
        torch.manual_seed(1)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        return layer

    def pair(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
        """bnlab's layer and torch's."""
        return self.layer(dtype), self.layer(dtype, nn)


INPUTS = {"NxC": (1, (4, 10)), "NxCxL": (1, (4, 5, 3)), "NxCxHxW": (2, (2, 3, 6, 6)), "NxCxDxHxW": (3, (2, 3, 4, 4, 4))}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"eps": 1e-3, "momentum": 0.8},
    "average": {"eps": 1e-3, "momentum": None},
    "not affine": {"affine": False},
    "no bias": {"bias": False},
    "not tracked": {"track_running_stats": False},
}


def cases(*options: str) -> pytest.MarkDecorator:
    found = {f"{name}-{option}": Case(*INPUTS[name], OPTIONS[option]) for name in INPUTS for option in options}
    return pytest.mark.parametrize("case", found.values(), ids=found)


@cases(*OPTIONS)
def test_training_and_inference_are_torchs_to_the_bit(case: Case) -> None:
    def step(layer: nn.Module, seed: int, dtype: torch.dtype) -> list[Tensor]:
        x = values(seed, *case.shape, dtype=dtype).requires_grad_()
        y = layer(x)
        layer.zero_grad()
        y.square().sum().backward()
        return [y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]

    for dtype in (torch.float64, torch.float32, *(() if case.options else HALVES)):
        ours, theirs = case.pair(dtype)
        for seed, training in enumerate((True, True, False)):
            ones, others = (step(layer.train(training), seed, dtype) for layer in (ours, theirs))
            assert equal(ones, others), dtype
            assert (ones[0].dtype, ones[0].stride()) == (others[0].dtype, others[0].stride())


@cases(*OPTIONS)
def test_forward_is_the_references(case: Case) -> None:
    layer, x = case.layer(), values(0, *case.shape, dtype=torch.float64)
    one = torch.ones(x.shape[1], dtype=torch.float64)
    affine = one if layer.weight is None else layer.weight, one * 0 if layer.bias is None else layer.bias
    assert torch.allclose(layer(x), reference.transform(x, *affine, layer.eps).y, rtol=0, atol=1e-10)
    if layer.running_mean is not None:
        expected = reference.inference(x, *affine, layer.running_mean, layer.running_var, layer.eps)
        assert torch.allclose(layer.eval()(x), expected, rtol=0, atol=1e-10)


@cases(*OPTIONS)
def test_repr_and_state_dict_are_torchs_both_ways(case: Case) -> None:
    (ours, theirs), copied = case.pair(), case.layer()
    assert repr(ours) == repr(theirs)
    x = values(0, *case.shape, dtype=torch.float64)
    ours(x)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    theirs.load_state_dict(ours.state_dict(), strict=True)
    copied.load_state_dict(theirs.state_dict(), strict=True)
    assert equal(ours.state_dict().values(), copied.state_dict().values())
    assert equal([ours(x), ours.eval()(x)], [copied(x), copied.eval()(x)])


@cases("plain", "not tracked")
@pytest.mark.parametrize("training", [True, False])
def test_copies(case: Case, training: bool) -> None:
    layer, x = case.layer().train(training), values(0, *case.shape, dtype=torch.float64)
    layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for copied in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert type(copied) is type(layer)
        assert copied.training == training
        assert equal([copied(x)], [layer(x)])


@cases("plain")
def test_inputs_that_are_not_contiguous(case: Case) -> None:
    layer, results = case.layer(), []
    for strided in (lambda t: t, lambda t: torch.stack([t, t], -1)[..., 0]):
        x = strided(values(0, *case.shape, dtype=torch.float64)).detach().requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(strided(values(1, *case.shape, dtype=torch.float64)))
        results.append([y, x.grad, *(p.grad.clone() for p in layer.parameters())])
    assert not x.is_contiguous()
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


@cases("plain", "not affine")
@RELU
@pytest.mark.parametrize("training", [True, False])
def test_gradients(case: Case, relu: bool, training: bool) -> None:
    layer, x = case.layer().train(training), values(0, *case.shape, dtype=torch.float64).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,), {"relu": relu})

    # The fast mode checks random projections of the Jacobians.
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *layer.parameters()), fast_mode=True, atol=1e-4)


@cases("plain", "not tracked")
@RELU
def test_the_memory_format_is_kept(case: Case, relu: bool) -> None:
    layer, x = case.layer(torch.float32), values(0, *case.shape)
    expected = layer(x, relu=relu)
    assert expected.is_contiguous()
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is None:
        return
    x = x.to(memory_format=last).requires_grad_()
    for converted in (layer, layer.to(memory_format=last)):
        y = converted(x, relu=relu)
        assert y.is_contiguous(memory_format=last)
        assert torch.allclose(y, expected, rtol=0, atol=1e-5)
    y.square().sum().backward()
    assert x.grad.is_contiguous(memory_format=last)


@cases(*OPTIONS)
@RELU
@pytest.mark.parametrize("training", [True, False])
def test_empty_batches_are_torchs(case: Case, relu: bool, training: bool) -> None:
    """In training they are counted, and leave the statistics."""
    full = values(0, *case.shape)
    shapes = [(0, *case.shape[1:])] + [(*case.shape[:-1], 0)] * (len(case.shape) > 2)
    for shape in shapes:
        found = []
        for layer in case.pair(torch.float32):
            layer(full)
            x = torch.zeros(shape, requires_grad=True)
            layer.train(training)
            y = layer(x, relu=relu) if isinstance(layer, norm.layers.BatchNorm) else layer(x)
            y.sum().backward()
            gradients = [p.grad for p in layer.parameters()]
            found.append([y, x.grad, *gradients, *layer.buffers(), layer(full)])
            assert y.shape == shape and not any(gradient.any() for gradient in gradients)
        assert equal(*found)


@pytest.mark.parametrize("kind", [norm.GhostBatchNorm2d, norm.SyncBatchNorm, norm.Whitening2d])
@pytest.mark.parametrize("shape", [(0, 6, 2, 2), (70, 6, 0, 2)])
def test_empty_batches_in_the_other_layers(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    layer = kind(6)
    layer(torch.randn(4, 6, 2, 2))
    before = state(layer)
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert [p.grad.tolist() for p in layer.parameters()] == [[0] * 6] * 2
    assert same(state(layer), before | {"num_batches_tracked": torch.tensor(2)})
    layer.eval()
    assert layer(x).shape == shape
    layer.statistics = "population"
    layer.train()(x)
    assert layer.num_batches_tracked == 0  # an optimiser step may follow, as after any batch
    assert norm.NormActivation(kind(6), nn.ReLU())(x).shape == shape


@LAYERS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_an_eps_that_torch_refuses_is_refused(n: int, training: bool, eps: float) -> None:
    ours, theirs = (getattr(module, f"BatchNorm{n}d")(3, eps=eps).train(training) for module in (norm, nn))
    x = values(0, *SHAPES[n])
    try:
        y = theirs(x)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(f"{error} at BatchNorm{n}d")):
            ours(x)
    else:
        assert (training, eps) == (False, 0.0)
        assert equal([ours(x)], [y])


# The ONNX backend's tests of its operator BatchNormalization.


class Operator(NamedTuple):
    """One case: attributes; the inputs x, scale, bias, mean and var; and the expected outputs."""

    attributes: dict[str, Any]
    inputs: list[np.ndarray]
    outputs: list[np.ndarray]


def operator_cases() -> dict[str, Operator]:
    """Collect the cases that onnx generated when its module was imported, and those that it has as files."""
    assert batch_normalization.BatchNormalization.export
    cases = {}
    for case in onnx_cases._NodeTestCases:
        if case.name.startswith("test_batchnorm_") and [n.op_type for n in case.model.graph.node] == [
            "BatchNormalization"
        ]:
            ((inputs, outputs),) = case.data_sets
            cases[case.name] = Operator(attributes(case.model.graph.node[0]), list(inputs), list(outputs))
    data = Path(onnx.__file__).parent / "backend" / "test" / "data" / "pytorch-converted"
    for folder in sorted(data.glob("test_BatchNorm*")):
        model = onnx.load(folder / "model.onnx")
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        (node,) = model.graph.node
        x, y = (array(folder / "test_data_set_0" / f"{name}_0.pb") for name in ("input", "output"))
        cases[folder.name] = Operator(attributes(node), [x, *(stored[name] for name in node.input[1:])], [y])
    return cases


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def array(path: Path) -> np.ndarray:
    return numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


OPERATOR_CASES = operator_cases()


def test_onnx_has_cases() -> None:
    assert len([name for name in OPERATOR_CASES if name.startswith("test_batchnorm_")]) == 4
    assert len([name for name in OPERATOR_CASES if name.startswith("test_BatchNorm")]) == 5


@pytest.mark.parametrize("name", OPERATOR_CASES)
def test_onnx_backend_case(name: str) -> None:
    case = OPERATOR_CASES[name]
    x, weight, bias, mean, var = (torch.from_numpy(a.copy()) for a in case.inputs)
    training = bool(case.attributes.get("training_mode", 0))
    # ONNX's momentum is the weight of the old value, torch's and ours that of the new one.
    momentum = 1 - case.attributes.get("momentum", 0.9)
    kind = {3: norm.BatchNorm1d, 4: norm.BatchNorm2d, 5: norm.BatchNorm3d}[x.ndim]
    layer = kind(x.shape[1], case.attributes.get("epsilon", 1e-5), momentum).train(training)
    given = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    layer.load_state_dict(given | {"num_batches_tracked": torch.tensor(0)})
    assert np.allclose(layer(x).detach().numpy(), case.outputs[0], rtol=1e-4, atol=1e-5)
    if training:
        _, expected_mean, expected_var = (torch.from_numpy(a.copy()) for a in case.outputs)
        assert torch.allclose(layer.running_mean, expected_mean, rtol=0, atol=1e-6)
        # ONNX stores the biased variance, torch and we the unbiased one, m / (m - 1) times as large.
        m = x.numel() // x.shape[1]
        expected_var = (expected_var - (1 - momentum) * var) * m / (m - 1) + (1 - momentum) * var
        assert torch.allclose(layer.running_var, expected_var, rtol=0, atol=1e-6)


# Each convention, against torch.nn.


@LAYERS
def test_arguments_are_torchs(n: int) -> None:
    ours, theirs = getattr(norm, f"BatchNorm{n}d"), getattr(nn, f"BatchNorm{n}d")
    assert issubclass(ours, theirs)
    for arguments in [
        (3,),
        (3, 1e-3),
        (3, 1e-3, None),
        (3, 1e-3, 0.5, False),
        (3, 1e-3, 0.5, True, False),
        (3, 1e-3, 0.5, True, True, "meta", torch.float64),
        (3, 1e-3, 0.5, True, True, "cpu", torch.float16),
    ]:
        one, other = ours(*arguments), theirs(*arguments)
        assert repr(one) == repr(other)
        for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
            assert getattr(one, name) == getattr(other, name)
        assert [(t.dtype, t.device) for t in one.state_dict().values()] == [
            (t.dtype, t.device) for t in other.state_dict().values()
        ]
    assert repr(ours(3, statistics="batch")).startswith(repr(theirs(3))[:-1])


@LAYERS
def test_eps_is_a_hundred_thousandth(n: int) -> None:
    """x of 1 and -1 has variance 1: y is 1 / sqrt(1 + eps)."""
    layer = getattr(norm, f"BatchNorm{n}d")(1).double()
    assert layer.eps == getattr(nn, f"BatchNorm{n}d")(1).eps == 1e-5
    x = torch.tensor([1.0, -1.0], dtype=torch.float64).view(2, 1, *[1] * n)
    assert layer(x).flatten()[0].item() == pytest.approx((1 + 1e-5) ** -0.5, rel=1e-12)


@pytest.mark.parametrize("kind", [norm.BatchNorm1d, nn.BatchNorm1d], ids=["ours", "torch"])
class TestConventions:
    """The same of ours and of torch's; values 1 and 3: mean 2, biased variance 1, unbiased 2."""

    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)

    def test_momentum_is_the_weight_of_the_new_batch(self, kind: type[nn.BatchNorm1d]) -> None:
        layer = kind(1, momentum=0.25).double()
        layer(self.x)
        assert layer.running_mean.item() == 0.25 * 2
        assert kind(1).momentum == 0.1

    def test_the_biased_variance_normalises_and_the_unbiased_one_is_stored(self, kind: type[nn.BatchNorm1d]) -> None:
        layer = kind(1, eps=1e-12, momentum=0.25).double()
        assert layer(self.x).flatten().tolist() == pytest.approx([-1, 1], rel=1e-9)
        assert layer.running_var.item() == 0.75 * 1 + 0.25 * 2

    def test_without_momentum_it_is_the_average_of_all_batches(self, kind: type[nn.BatchNorm1d]) -> None:
        layer = kind(1, momentum=None).double()
        for factor in (1, 2, 4):
            layer(self.x * factor)
        assert layer.running_mean.item() == pytest.approx((2 + 4 + 8) / 3, rel=1e-12)
        assert layer.running_var.item() == pytest.approx((2 + 8 + 32) / 3, rel=1e-12)
        assert layer.num_batches_tracked.item() == 3

    def test_a_moving_average_still_holds_its_beginning(self, kind: type[nn.BatchNorm1d]) -> None:
        """(1 - momentum)^k of (0, 1) after k steps."""
        layer, k = kind(1).double(), 7
        for _ in range(k):
            layer(self.x)
        assert layer.running_mean.item() == pytest.approx((1 - 0.9**k) * 2, rel=1e-12)
        assert layer.running_var.item() == pytest.approx(0.9**k * 1 + (1 - 0.9**k) * 2, rel=1e-12)

    def test_without_tracking_evaluation_is_by_the_batch(self, kind: type[nn.BatchNorm1d]) -> None:
        layer = kind(1, track_running_stats=False).double()
        assert list(layer.buffers()) == []
        assert torch.equal(layer.train()(self.x), layer.eval()(self.x))
        assert layer(self.x).mean().abs() < 1e-12

    def test_tracking_taken_back_by_hand(self, kind: type[nn.BatchNorm1d]) -> None:
        layer = kind(1).double()
        layer(self.x)
        before = [buffer.clone() for buffer in layer.buffers()]
        layer.track_running_stats = False
        assert layer(self.x).mean().abs() < 1e-12
        assert equal(layer.buffers(), before)
        layer.running_mean = layer.running_var = None
        assert layer.eval()(self.x).mean().abs() < 1e-12

    def test_one_value_for_each_channel_is_an_error(self, kind: type[nn.BatchNorm1d]) -> None:
        for shape in ((1, 1), (1, 1, 1)):
            x = torch.zeros(shape)
            words = f"Expected more than 1 value per channel when training, got input size {x.size()}"
            with pytest.raises(ValueError, match=re.escape(words)):
                kind(1)(x)
        assert kind(1).eval()(torch.zeros(1, 1)).item() == 0


CHECKPOINTED = {
    "plain": partial(norm.BatchNorm2d, 6),
    "average": partial(norm.BatchNorm2d, 6, momentum=None),
    "population": partial(norm.BatchNorm2d, 6, statistics="population"),
    "not tracked": partial(norm.BatchNorm2d, 6, track_running_stats=False),
    "ghost": partial(norm.GhostBatchNorm2d, 6, ghost_size=3),
    "sync": partial(norm.SyncBatchNorm, 6),
    "whitening": partial(norm.Whitening2d, 6),
    "relu": lambda: norm.NormActivation(norm.BatchNorm2d(6), nn.ReLU()),
}


def around(model: nn.Sequential, x: Tensor, *, reentrant: bool) -> Tensor:
    return checkpoint(model, x, use_reentrant=reentrant)


def nested(model: nn.Sequential, x: Tensor, *, reentrant: bool) -> Tensor:
    def outer(x: Tensor) -> Tensor:
        x = checkpoint(model[:2], x, use_reentrant=reentrant)
        return checkpoint(model[2:], x, use_reentrant=not reentrant)

    return checkpoint(outer, x, use_reentrant=reentrant)


def in_parts(model: nn.Sequential, x: Tensor, *, reentrant: bool) -> Tensor:
    return checkpoint_sequential(model, 2, x, use_reentrant=reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own, where checkpoints are nested
@pytest.mark.parametrize("kind", CHECKPOINTED)
@pytest.mark.parametrize("way", [around, nested, in_parts])
@pytest.mark.parametrize("reentrant", [False, True])
def test_within_a_checkpoint_statistics_move_once(kind: str, way: Any, reentrant: bool) -> None:
    found = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        made = [CHECKPOINTED[kind]() for _ in range(2)]
        model = nn.Sequential(nn.Conv2d(3, 6, 3), made[0], nn.Conv2d(6, 6, 1), made[1], nn.Sigmoid())
        for seed in range(2):
            x = values(seed, 7, 3, 6, 6).requires_grad_()
            y = way(model, x, reentrant=reentrant) if checkpoints else model(x)
            y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    assert equal(*found)


def test_gradients_of_gradients_through_a_checkpoint() -> None:
    found = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Conv2d(3, 6, 3), norm.BatchNorm2d(6), nn.Sigmoid()), batch().requires_grad_()
        y = checkpoint(model, x, use_reentrant=False) if checkpoints else model(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        found.append([dx, x.grad, model[1].weight.grad, *model.buffers()])
    assert equal(*found) and model[1].num_batches_tracked == 1


def test_statistics_measured_between_forward_and_backward_are_not_outdated_by_a_checkpoint() -> None:
    layer, x = norm.BatchNorm2d(3, statistics="population"), batch().requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False)
    norm.recalibrate(layer, [batch()])
    y.square().sum().backward()
    assert layer.num_batches_tracked == 1


def test_a_convertible_layer_of_torchs_moves_twice_within_a_checkpoint() -> None:
    model, x = nn.Sequential(nn.BatchNorm2d(3), nn.Sigmoid()), batch().requires_grad_()
    for expected in (2, 3):
        checkpoint(model, x, use_reentrant=False).sum().backward()
        assert model[0].num_batches_tracked == expected
        norm.convert(model)


# torch.fx.

TRACED = {
    **CHECKPOINTED,
    "population": lambda: norm.BatchNorm2d(6),
    "sigmoid": lambda: norm.NormActivation(norm.BatchNorm2d(6), nn.Sigmoid(), "after"),
}


@pytest.mark.parametrize("kind", TRACED)
@pytest.mark.parametrize("copied", [lambda m: m, lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
def test_fx_traces_them_as_one_call(kind: str, copied: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), TRACED[kind](), nn.Conv2d(6, 6, 1))
    traced = copied(fx.symbolic_trace(copy.deepcopy(model)))
    names = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert {"1", "1.norm"} & set(names)
    for training in (True, False, True):
        found = []
        for each in (model, traced):
            each.train(training)
            x = batch().requires_grad_()
            y = each(x)
            each.zero_grad()
            y.square().sum().backward()
            found.append([y, x.grad, *(p.grad for p in each.parameters()), *each.buffers()])
        assert equal(*found)
    if kind == "not tracked":
        return
    norm.freeze(traced)
    before = [buffer.clone() for buffer in traced.buffers()]
    traced.train()(batch())
    assert equal(traced.buffers(), before)


def test_fx_runs_the_forward_of_a_subclass_once() -> None:
    class Doubled(norm.BatchNorm2d):
        def forward(self, input: Tensor, *, relu: bool = False) -> Tensor:
            return super().forward(input, relu=relu) * 2

    model = nn.Sequential(Doubled(3))
    expected = copy.deepcopy(model)(batch())
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    traced = fx.symbolic_trace(model)
    assert not seen
    assert torch.equal(traced(batch()), expected) and len(seen) == 1


def test_refusals_name_the_layer() -> None:
    network = nn.Sequential()
    network.add_module("features", nn.Sequential(norm.BatchNorm2d(3)))
    messages = {
        (1, 3, 1, 1): r"^Expected more than 1 value per channel when training, got input size .*\[1, 3, 1, 1\].* at "
        r"features.0 \(BatchNorm2d\): .*larger images.*freeze\(\).*eval\(\)",
        (4, 3): r"^expected 4D input \(got 2D input\) at features.0 \(BatchNorm2d\)$",
    }
    for shape, message in messages.items():
        with pytest.raises(ValueError if len(shape) == 2 else norm.TooFewValuesError, match=message):
            network(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"^features.0 \(BatchNorm2d\) is for 3 channels, and got 5: \[4, 5, 2, 2\]"):
        network(torch.zeros(4, 5, 2, 2))
    network.eval()
    for shape in ((1, 3, 1, 1), (0, 3, 4, 4)):
        assert network(torch.zeros(shape)).shape == shape


def test_plain_layers_compute_nothing_else() -> None:
    class Derived(norm.BatchNorm2d):
        pass

    class Activated(norm.BatchNorm2d):
        def forward(self, input: Tensor, *, relu: bool = False) -> Tensor:
            return super().forward(input).relu()

    replaced = nn.BatchNorm2d(3)
    replaced.forward = lambda input: input
    plain = [nn.BatchNorm2d(3), nn.SyncBatchNorm(3), norm.BatchNorm2d(3), Derived(3)]
    assert [is_plain(layer) for layer in (*plain, Activated(3), replaced)] == [True] * 4 + [False] * 2


def test_the_layers_of_a_model() -> None:
    shared = norm.BatchNorm2d(3)
    model = nn.Sequential(shared, nn.Sequential(nn.BatchNorm2d(3), shared), nn.ReLU(), norm.BatchNorm1d(3))
    assert [name for name, _ in batch_norm_layers(model)] == ["0", "1.0", "3"]
    assert [type(layer) for _, layer in batch_norm_layers(model)] == [
        norm.BatchNorm2d,
        nn.BatchNorm2d,
        norm.BatchNorm1d,
    ]


# Properties.

seeds = st.integers(0, 2**32 - 1)
dimensions = st.integers(1, 3)


@given(seeds, dimensions)
@settings(max_examples=20)
def test_the_identity_can_be_recovered(seed: int, n: int) -> None:
    """gamma = sqrt(Var[x]), beta = E[x] (paper, sec. 3)."""
    x = values(seed, *SHAPES[n], dtype=torch.float64)
    layer = getattr(norm, f"BatchNorm{n}d")(3, eps=1e-30).double()
    rows = x.transpose(0, 1).flatten(1)
    layer.weight.data, layer.bias.data = rows.var(1, correction=0).sqrt(), rows.mean(1)
    assert (layer(x) - x).abs().max() < 1e-10


@given(seeds, dimensions, st.integers(1, 6))
@settings(max_examples=20)
def test_the_cumulative_average_is_algorithm_2(seed: int, n: int, number: int) -> None:
    batches = [values(seed + i, *SHAPES[n], dtype=torch.float64) * (i + 1) + i for i in range(number)]
    layer = getattr(norm, f"BatchNorm{n}d")(3, momentum=None).double()
    for batch in batches:
        layer(batch)
    expected = reference.population(batches)
    assert (layer.running_mean - expected.mean).abs().max() < 1e-10
    assert (layer.running_var / expected.var - 1).abs().max() < 1e-10


@given(seeds, st.booleans(), st.booleans())
@settings(max_examples=20)
def test_a_bias_before_it_has_no_gradient_and_no_effect(seed: int, convolution: bool, relu: bool) -> None:
    torch.manual_seed(seed)
    before = (nn.Conv2d(3, 4, 3) if convolution else nn.Conv2d(3, 4, 1)).double()
    layer = norm.BatchNorm2d(4).double()
    u, dy = values(seed, 4, 3, 5, 5, dtype=torch.float64), values(seed + 1, 4, 4, *[3 if convolution else 5] * 2)
    y = layer(before(u), relu=relu)
    (y * dy).sum().backward()
    assert before.weight.grad.abs().max() > 1e-3
    assert before.bias.grad.abs().max() < 1e-9 * (1 + before.weight.grad.abs().max())
    before.bias.data += 10
    assert (layer(before(u), relu=relu) - y).abs().max() < 1e-9


@given(seeds, dimensions, st.booleans())
@settings(max_examples=20)
def test_gradients_are_the_references(seed: int, n: int, relu: bool) -> None:
    layer = getattr(norm, f"BatchNorm{n}d")(3).double()
    layer.weight.data, layer.bias.data = values(seed + 1, 2, 3, dtype=torch.float64)
    x, dy = (values(seed + i, *SHAPES[n], dtype=torch.float64) for i in (2, 3))
    y = layer(x.requires_grad_(), relu=relu)
    y.backward(dy)
    x = x.detach()
    plain = reference.transform(x, layer.weight, layer.bias, layer.eps).y
    if relu:
        dy = dy * (plain > 0)
    expected = reference.gradients(dy, x, layer.weight.detach(), layer.eps)
    assert (y - (plain.relu() if relu else plain)).abs().max() < 1e-10
    x.grad = None
    found = layer.weight.grad, layer.bias.grad
    for one, other in zip(found, expected[1:], strict=True):
        assert (one - other).abs().max() < 1e-8


# Types, layouts and what is not finite.


@LAYOUTS
@RELU
def test_half_precision_input_with_float_parameters(layout: torch.memory_format, relu: bool) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = values(0, 8, 3, 6, 6, dtype=dtype).to(memory_format=layout)
        layer, exact = norm.BatchNorm2d(3), norm.BatchNorm2d(3)
        y = layer(x.requires_grad_(), relu=relu)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=layout)
        assert (y - exact(x.float(), relu=relu)).abs().max() < 8 * torch.finfo(dtype).eps
        assert torch.allclose(layer.running_mean, exact.running_mean, atol=1e-6)
        assert torch.allclose(layer.running_var, exact.running_var, atol=1e-5)
        assert layer.running_var.dtype == torch.float32
        y.sum().backward()
        assert (x.grad.dtype, layer.weight.grad.dtype) == (dtype, torch.float32)
        assert layer.eval()(x).dtype == dtype


def test_one_example_of_several_positions() -> None:
    x = values(0, 1, 3, 4, 4, dtype=torch.float64)
    y = norm.BatchNorm2d(3).double()(x)
    one = torch.ones(3)
    assert (y - reference.transform(x, one, one * 0, 1e-5).y).abs().max() < 1e-10


@LAYOUTS
@RELU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_from_0_in_training_and_inference(layout: torch.memory_format, relu: bool, dtype: torch.dtype) -> None:
    x = (values(0, 8, 3, 20, 20, dtype=torch.float64) * 0.05 + 1e6).to(dtype, memory_format=layout)
    layer = norm.BatchNorm2d(3, momentum=1.0).to(dtype)
    one = torch.ones(3)
    step = reference.transform(x, one, one * 0, layer.eps)
    rectified = torch.relu if relu else torch.nn.Identity()
    rounding = torch.finfo(dtype).eps
    y = layer(x, relu=relu)
    assert (y - rectified(step.y)).abs().max() < 1e-6 + 400 * rounding
    assert y.is_contiguous(memory_format=layout)
    assert (layer.running_mean - step.mean).abs().max() < 1e6 * rounding
    assert (layer.running_var / step.var - 1).abs().max() < 1e-3  # unbiased: 3200 / 3199
    y = layer.eval()(x, relu=relu)
    stored = reference.inference(x, one, one * 0, layer.running_mean, layer.running_var, layer.eps)
    assert (y - rectified(stored)).abs().max() < 1e-6 + 400 * rounding


@LAYOUTS
@RELU
@pytest.mark.parametrize("compiling", [False, True], ids=["cpu", "device"])
@pytest.mark.parametrize(("momentum", "bad"), [(0.1, torch.nan), (None, torch.inf)])
def test_a_batch_that_is_not_finite_leaves_no_trace(
    layout: torch.memory_format,
    relu: bool,
    compiling: bool,
    momentum: float | None,
    bad: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    ours, theirs = norm.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    for number in range(3):
        x = values(number, 4, 3, 5, 5).to(memory_format=layout)
        spoilt = x.clone(memory_format=torch.preserve_format)
        spoilt[1, 2, 3, 4] = bad
        before = [buffer.clone() for buffer in ours.buffers()]
        ours(spoilt.requires_grad_(), relu=relu).sum().backward()
        assert equal(ours.buffers(), before)
        ours(x.requires_grad_(), relu=relu).sum().backward()
        theirs(x)
        assert equal(ours.buffers(), theirs.buffers())
        assert ours.num_batches_tracked == number + 1


def test_on_the_meta_device() -> None:
    layer = norm.BatchNorm2d(3, device="meta")
    x = torch.empty(4, 3, 5, 5, device="meta", requires_grad=True)
    for relu in (False, True):
        y = layer(x, relu=relu)
        assert (y.shape, y.device.type) == (x.shape, "meta")
        y.sum().backward()
        assert x.grad.shape == x.shape


def test_within_autocast() -> None:
    found = []
    for kind in (torch.nn.BatchNorm2d, norm.BatchNorm2d):
        torch.manual_seed(0)
        conv, layer = torch.nn.Conv2d(3, 4, 3), kind(4)
        x = torch.randn(4, 3, 8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
            y = layer(y, relu=True) if kind is norm.BatchNorm2d else layer(y).relu()
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        found.append([y, layer.running_var, layer.weight.grad, conv.weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Freezing and statistics modes.

OUTDATED = r"has no population statistics for its present weights: .*norm\.recalibrate\(model, batches\)"


def batch(seed: int = 0) -> Tensor:
    return torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def layer(**settings: object) -> norm.BatchNorm2d:
    """A layer with statistics other than the initial ones and any batch's, and with random gamma and beta."""
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
    return F.batch_norm(x, of.running_mean, of.running_var, of.weight, of.bias, eps=of.eps)


def by_batch(of: norm.BatchNorm2d, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, of.weight, of.bias, training=True, eps=of.eps)


@RELU
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


@RELU
def test_batch_statistics_in_inference_move_nothing(relu: bool) -> None:
    bn = layer(statistics="batch")
    assert bn.num_batches_tracked == 1  # training moves the running statistics nevertheless
    bn.eval()
    before = state(bn)
    y = by_batch(bn, batch())
    assert torch.equal(bn(batch(), relu=relu), torch.relu(y) if relu else y)
    assert same(state(bn), before)


@RELU
def test_training_outdates_population_statistics_without_moving_them(relu: bool) -> None:
    bn = layer()
    bn.statistics = "population"
    y = by_stored(bn, batch())
    assert torch.equal(bn.eval()(batch(), relu=relu), torch.relu(y) if relu else y)  # some batches were measured
    before = state(bn)
    y = by_batch(bn, batch())
    assert torch.equal(bn.train()(batch(), relu=relu), torch.relu(y) if relu else y)
    assert bn.num_batches_tracked == 0
    assert same(state(bn), before | {"num_batches_tracked": torch.tensor(0)})
    with pytest.raises(ValueError, match=rf"^BatchNorm2d {OUTDATED}"):
        bn.eval()(batch())


def test_a_batch_that_is_not_finite_outdates_population_statistics_too() -> None:
    """The optimiser step that follows changes the weights nevertheless."""
    bn = layer(statistics="population")
    bn.num_batches_tracked.fill_(4)
    bn.train()(batch() * torch.nan)
    assert bn.num_batches_tracked == 0


def test_refusing_outdated_statistics_names_the_layer() -> None:
    network = nn.Sequential()
    network.add_module("features", nn.Sequential(nn.Identity(), norm.BatchNorm2d(3, statistics="population")))
    with pytest.raises(ValueError, match=rf"^features.1 \(BatchNorm2d\) {OUTDATED}"):
        network.eval()(batch())


def test_unknown_statistics_are_refused() -> None:
    for do in (lambda: norm.BatchNorm2d(3, statistics="ema"), lambda: setattr(layer(), "statistics", "ema")):
        with pytest.raises(ValueError, match="one of running, population, batch, not 'ema'"):
            do()
    with pytest.raises(ValueError, match=r"population statistics need .*track_running_stats=True"):
        norm.BatchNorm2d(3, track_running_stats=False, statistics="population")
    bn = layer()
    with pytest.raises(ValueError):
        bn.statistics = "ema"
    assert bn.statistics == "running"


@RELU
@pytest.mark.parametrize("statistics", ["running", "population"])
def test_a_frozen_layer_uses_the_stored_statistics_in_training_too(relu: bool, statistics: str) -> None:
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


@RELU
def test_setting_training_by_hand_does_not_unfreeze(relu: bool) -> None:
    bn = layer().freeze()
    before = state(bn)
    bn.training = True
    y = by_stored(bn, batch())
    assert torch.equal(bn(batch(), relu=relu), torch.relu(y) if relu else y)
    assert same(state(bn), before)


@pytest.mark.parametrize("frozen_in", [True, False])
@pytest.mark.parametrize("unfrozen_in", [True, False])
def test_unfreezing_returns_to_the_last_requested_mode(frozen_in: bool, unfrozen_in: bool) -> None:
    network = nn.Sequential(layer()).train(frozen_in)
    network[0].freeze()
    network.train(unfrozen_in)
    assert network[0].unfreeze() is network[0]
    assert not network[0].frozen
    assert network[0].training == unfrozen_in
    before = state(network)
    network(batch())
    assert same(state(network), before) != unfrozen_in
    assert layer().train(frozen_in).freeze().unfreeze().training == frozen_in


def test_gamma_and_beta_stop_training_until_the_layer_is_unfrozen() -> None:
    bn = layer()
    bn.freeze()
    assert [p.requires_grad for p in bn.parameters()] == [False, False]
    bn.freeze()  # twice has the same effect as once
    bn.unfreeze()
    assert [p.requires_grad for p in bn.parameters()] == [True, True]
    bn.freeze(affine=False)
    assert [p.requires_grad for p in bn.parameters()] == [True, True]
    bn(batch()).square().sum().backward()
    assert bn.weight.grad.abs().min() > 0


def test_unfreezing_trains_only_what_was_trained_before() -> None:
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


def test_freezing_needs_running_statistics() -> None:
    for bn in (norm.BatchNorm2d(3, track_running_stats=False), norm.BatchNorm2d(3)):
        bn.track_running_stats = False
        with pytest.raises(
            ValueError, match=r"^BatchNorm2d keeps no running statistics to freeze: .*track_running_stats"
        ):
            bn.freeze()
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
        twice = copied(bn)
        assert (twice.statistics, twice.example_weight) == (which, 0.25)


def test_repr_shows_the_mode() -> None:
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


def test_unfreezing_returns_to_a_mode_set_by_hand() -> None:
    layer = norm.BatchNorm2d(3)
    layer.training = False
    assert not layer.freeze().unfreeze().training


@pytest.mark.parametrize("momentum", [0.1, None])
def test_layers_that_count_no_batches(momentum: float | None) -> None:
    own, plain = norm.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    x = torch.randn(4, 3, 5, 5) + 7
    for layer in (own, plain):
        layer.num_batches_tracked = None
        layer(x)
        layer.eval()
    assert torch.equal(own(x), plain(x))
    assert torch.equal(own.running_mean, plain.running_mean)


# Example weighting.

WEIGHTED_SHAPES = pytest.mark.parametrize("shape", [(4, 3), (4, 3, 6), (4, 3, 5, 2), (2, 3, 2, 3, 2)], ids=str)
EPS = 1e-5


def example(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, mean, var, gamma, beta."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype) * 2 + 1
    return x, *(t.to(dtype) for t in (torch.randn(3), torch.rand(3) + 0.2, torch.rand(3) + 0.5, torch.randn(3)))


def by_the_paper(x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, weight: float) -> Tensor:
    """Summers & Dinneen, sec. 3.1: E[x] and E[x^2] are mixed, example by example, channel by channel."""
    y = torch.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            own = x[n, c]
            first = (1 - weight) * mean[c] + weight * own.mean()
            second = (1 - weight) * (var[c] + mean[c] ** 2) + weight * own.square().mean()
            y[n, c] = gamma[c] * (own - first) / (second - first**2 + EPS).sqrt() + beta[c]
    return y


@WEIGHTED_SHAPES
@pytest.mark.parametrize("weight", [0.03, 0.5])
def test_example_weighting_is_the_papers_formula(shape: tuple[int, ...], weight: float) -> None:
    given = example(shape)
    y = normalise_with_own_statistics(*given, EPS, weight)
    assert (y - by_the_paper(*given, weight)).abs().max() < 1e-10


@WEIGHTED_SHAPES
def test_weight_0_is_plain_inference(shape: tuple[int, ...]) -> None:
    x, mean, var, gamma, beta = example(shape)
    plain = F.batch_norm(x, mean, var, gamma, beta, training=False, eps=EPS)
    assert (normalise_with_own_statistics(x, mean, var, gamma, beta, EPS, 0.0) - plain).abs().max() < 1e-12


@WEIGHTED_SHAPES
def test_weight_1_is_the_examples_own_statistics(shape: tuple[int, ...]) -> None:
    x, mean, var, gamma, beta = example(shape)
    y = normalise_with_own_statistics(x, mean, var, gamma, beta, EPS, 1.0)
    if len(shape) == 2:
        assert torch.equal(y, beta.expand_as(x))
    else:
        plain = F.instance_norm(x, weight=gamma, bias=beta, eps=EPS)
        assert (y - plain).abs().max() < 1e-10


def test_example_weighting_far_from_0_loses_no_variance() -> None:
    x, _, var, gamma, beta = example((4, 3, 50, 20))
    mean = torch.full((3,), 1e6, dtype=torch.float64)
    near = normalise_with_own_statistics(x, mean * 0, var, gamma, beta, EPS, 0.25)
    far = normalise_with_own_statistics(x + 1e6, mean, var, gamma, beta, EPS, 0.25)
    assert (near - far).abs().max() < 1e-7
    far = normalise_with_own_statistics(*(t.float() for t in (x.round() + 1e6, mean, var, gamma, beta)), EPS, 0.25)
    assert (normalise_with_own_statistics(x.round(), mean * 0, var, gamma, beta, EPS, 0.25) - far).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_example_weighting_keeps_type_and_memory_format(dtype: torch.dtype) -> None:
    x, *rest = example((4, 3, 6, 5), dtype)
    y = normalise_with_own_statistics(x.to(memory_format=torch.channels_last), *rest, EPS, 0.25)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = normalise_with_own_statistics(*(t.double() for t in (x, *rest)), EPS, 0.25)
    assert (y.double() - exact).abs().max() < 60 * torch.finfo(dtype).eps


def test_example_weighting_in_half_precision_with_float_parameters() -> None:
    x, *rest = example((4, 3, 6, 5), torch.float32)
    y = normalise_with_own_statistics(x.bfloat16(), *rest, EPS, 0.25)
    assert y.dtype == torch.bfloat16
    assert (y - normalise_with_own_statistics(x, *rest, EPS, 0.25)).abs().max() < 0.1


def test_example_weighting_without_gamma_and_beta() -> None:
    x, mean, var, _, _ = example((4, 3, 6))
    one, zero = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    plain = normalise_with_own_statistics(x, mean, var, None, None, EPS, 0.25)
    assert torch.equal(plain, normalise_with_own_statistics(x, mean, var, one, zero, EPS, 0.25))


@RELU
def test_example_weighting_in_the_layers_inference(relu: bool) -> None:
    x, mean, var, gamma, beta = example((4, 3, 6, 5))
    layer = norm.BatchNorm2d(3, example_weight=0.25).double().eval()
    for name, value in {"running_mean": mean, "running_var": var, "weight": gamma, "bias": beta}.items():
        getattr(layer, name).data.copy_(value)
    expected = by_the_paper(x, mean, var, gamma, beta, 0.25)
    assert (layer(x, relu=relu) - (expected.relu() if relu else expected)).abs().max() < 1e-10
    plain = nn.BatchNorm2d(3).double()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.train()(x), plain(x))  # training does not weight


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_example_weight_is_from_0_to_1(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"example_weight must be from 0 to 1, not {weight}"):
        norm.BatchNorm2d(3, example_weight=weight)
    assert norm.BatchNorm2d(3, example_weight=1).example_weight == 1


def test_example_weighting_of_large_values_in_half_precision() -> None:
    x = (torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 300).half()
    layer = norm.BatchNorm2d(3, example_weight=0.1).eval()
    layer.running_var.fill_(9e4)
    torch.testing.assert_close(layer(x).float(), layer(x.float()), atol=0.01, rtol=0.01)
