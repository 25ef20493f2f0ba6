import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.backend.test.case import node as onnx_cases
from onnx.backend.test.case.node import batch_normalization
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleInfo, ModuleInput, module_db
from torch.testing._internal.common_utils import noncontiguous_like

from bnlab import norm
from bnlab.norm import reference
from bnlab.norm.layers import batch_norm_layers

# Importing torch's tests puts their own settings in place of those of tests/conftest.py, and shuts torch's flags.
settings.load_profile("bnlab")
torch.backends.__allow_nonbracketed_mutation_flag = True

OURS = {getattr(nn, f"BatchNorm{n}d"): getattr(norm, f"BatchNorm{n}d") for n in (1, 2, 3)}
LAYERS = pytest.mark.parametrize("n", [1, 2, 3])
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
SHAPES = {1: (6, 3, 5), 2: (4, 3, 5, 4), 3: (2, 3, 3, 4, 2)}


def values(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype) * 2 + 1


def equal(ones: Any, others: Any) -> bool:
    """To the bit, NaN being NaN."""
    ones, others = list(ones), list(others)
    assert len(ones) == len(others)
    return all(torch.equal(one.nan_to_num(1e9), other.nan_to_num(1e9)) for one, other in zip(ones, others, strict=True))


# torch's own tests of modules: what its test/test_modules.py does with nn.BatchNorm, done with ours.


class Case(NamedTuple):
    """One of the inputs that torch tests a module with."""

    info: ModuleInfo
    number: int
    training: bool

    def input(self, dtype: torch.dtype, *, requires_grad: bool = False) -> ModuleInput:
        torch.manual_seed(0)
        given = {"device": "cpu", "dtype": dtype, "requires_grad": requires_grad, "training": self.training}
        return self.info.module_inputs_func(self.info, **given)[self.number]

    def x(self, dtype: torch.dtype, *, requires_grad: bool = False) -> Tensor:
        (x,) = self.input(dtype, requires_grad=requires_grad).forward_input.args
        return x

    def layer(self, dtype: torch.dtype = torch.float64, kind: Callable[..., nn.Module] | None = None) -> nn.Module:
        made = self.input(dtype).constructor_input
        layer = (kind or OURS[self.info.module_cls])(*made.args, **made.kwargs).to(dtype).train(self.training)
        torch.manual_seed(1)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        return layer


def torchs_cases() -> list[Any]:
    found = []
    for info in module_db:
        if info.module_cls in OURS:
            for training in (True, False):
                inputs = info.module_inputs_func(info, "cpu", torch.float64, False, training)
                for number, one in enumerate(inputs):
                    label = f"{info.module_cls.__name__}-{one.desc or 'plain'}-{'train' if training else 'eval'}"
                    found.append(pytest.param(Case(info, number, training), id=label))
    return found


def refused(case: Case) -> bool:
    """Empty batches, which torch lets pass in training and makes NaN statistics of; ours refuse them."""
    return not case.x(torch.float64).numel() and (case.training or case.layer().running_mean is None)


ALL_CASES = torchs_cases()
CASES = pytest.mark.parametrize("case", [p for p in ALL_CASES if not refused(p.values[0])])


def test_torch_has_inputs_to_test_with() -> None:
    assert len(ALL_CASES) == 44
    assert sum(refused(p.values[0]) for p in ALL_CASES) == 3


@pytest.mark.parametrize("case", [p for p in ALL_CASES if refused(p.values[0])])
def test_empty_batches_are_refused_in_training(case: Case) -> None:
    layer, x = case.layer(), case.x(torch.float64)
    with pytest.raises(ValueError) as error:
        layer(x)
    assert str(error.value) == (
        f"{type(layer).__name__} got an empty batch, {list(x.shape)}: "
        "statistics need values; leave the batch out, or call eval() for inference"
    )
    assert layer.running_mean.abs().sum() == 0


@CASES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_torchs_to_the_bit(case: Case, dtype: torch.dtype) -> None:
    ours, theirs = case.layer(dtype), case.layer(dtype, case.info.module_cls)
    for shifted in range(3):
        x, x_other = (case.x(dtype) + shifted for _ in range(2))
        y, y_other = ours(x.requires_grad_()), theirs(x_other.requires_grad_())
        assert equal([y], [y_other])
        assert (y.dtype, y.stride()) == (y_other.dtype, y_other.stride())
        y.square().sum().backward()
        y_other.square().sum().backward()
        assert equal([x.grad], [x_other.grad])
        assert equal((p.grad for p in ours.parameters()), (p.grad for p in theirs.parameters()))
        assert equal(ours.buffers(), theirs.buffers())
    assert equal([ours.eval()(x)], [theirs.eval()(x)])


@CASES
def test_forward_is_the_references(case: Case) -> None:
    layer, x = case.layer(), case.x(torch.float64)
    one = torch.ones(x.shape[1], dtype=torch.float64)
    gamma = one if layer.weight is None else layer.weight
    beta = one * 0 if layer.bias is None else layer.bias
    if case.training or layer.running_mean is None:
        expected = reference.transform(x, gamma, beta, layer.eps).y
    else:
        expected = reference.inference(x, gamma, beta, layer.running_mean, layer.running_var, layer.eps)
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-10)
    given = case.input(torch.float64)
    if given.reference_fn is not None:
        assert torch.allclose(layer(x), given.reference_fn(layer, x), rtol=0, atol=1e-10)


@CASES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_factory_arguments(case: Case, dtype: torch.dtype) -> None:
    made = case.input(torch.float32).constructor_input
    for device in ("cpu", "meta"):
        layer = OURS[case.info.module_cls](*made.args, **made.kwargs, device=device, dtype=dtype)
        for tensor in (*layer.parameters(), *layer.buffers()):
            assert tensor.device.type == device
            assert tensor.dtype == (dtype if tensor.dtype.is_floating_point else torch.long)


@CASES
def test_pickling(case: Case) -> None:
    layer, x = case.layer(), case.x(torch.float64)
    layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert type(again) is type(layer)
        assert again.training == case.training
        assert equal([again(x)], [layer(x)])


@CASES
def test_repr_is_torchs(case: Case) -> None:
    assert repr(case.layer()) == repr(case.layer(kind=case.info.module_cls))


@CASES
def test_state_dicts_are_torchs_both_ways(case: Case) -> None:
    ours, theirs = case.layer(), case.layer(kind=case.info.module_cls)
    x = case.x(torch.float64)
    ours(x)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file), strict=True)
    again = case.layer()
    again.load_state_dict(theirs.state_dict(), strict=True)
    assert equal(ours.state_dict().values(), again.state_dict().values())
    assert equal([ours(x), ours.eval()(x)], [again(x), again.eval()(x)])
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata


@CASES
def test_tensors_that_are_not_contiguous(case: Case) -> None:
    layer, dy = case.layer(), None
    results = []
    for change in (lambda t: t, noncontiguous_like):
        x = change(case.x(torch.float64)).detach().requires_grad_()
        layer.zero_grad()
        y = layer(x)
        dy = change(values(0, *y.shape, dtype=y.dtype))
        y.backward(dy)
        results.append([y, x.grad, *(p.grad.clone() for p in layer.parameters())])
    assert not x.is_contiguous() or x.numel() < 2
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


@CASES
@pytest.mark.parametrize("relu", [False, True])
def test_gradients(case: Case, relu: bool) -> None:
    layer, x = case.layer(), case.x(torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,), {"relu": relu})

    # Random projections instead of whole Jacobians: what torch's own tests do where they are slow.
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *layer.parameters()), fast_mode=True, atol=1e-4)


@CASES
@pytest.mark.parametrize("relu", [False, True])
def test_the_memory_layout_is_kept(case: Case, relu: bool) -> None:
    layer, x = case.layer(torch.float32), case.x(torch.float32)
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if layout is None:
        assert layer(x, relu=relu).is_contiguous()
        return
    expected = layer(x, relu=relu)
    x = x.to(memory_format=layout).requires_grad_()
    for moved in (layer, layer.to(memory_format=layout)):
        y = moved(x, relu=relu)
        assert y.is_contiguous(memory_format=layout)
        assert torch.allclose(y, expected, rtol=0, atol=1e-5)
    y.square().sum().backward()
    assert x.grad.is_contiguous(memory_format=layout)


@CASES
def test_training_and_evaluation_differ(case: Case) -> None:
    assert case.info.train_and_eval_differ
    layer, x = case.layer(), case.x(torch.float64)
    differ = layer.running_mean is not None and x.numel() > 0
    assert equal([layer.eval()(x)], [copy.deepcopy(layer).train()(x) if x.numel() else x]) != differ


@pytest.mark.parametrize("info", [i for i in module_db if i.module_cls in OURS], ids=lambda i: i.module_cls.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_what_torch_refuses_is_refused(info: ModuleInfo, training: bool) -> None:
    tried = 0
    given = {"device": "cpu", "dtype": torch.float64, "requires_grad": False, "training": training}
    for bad in info.module_error_inputs_func(info, **given):
        made, (x,) = bad.module_error_input.constructor_input, bad.module_error_input.forward_input.args
        ours, theirs = (
            kind(*made.args, **made.kwargs).double().train(training)
            for kind in (OURS[info.module_cls], info.module_cls)
        )
        try:
            y = theirs(x)
        except bad.error_type as error:
            with pytest.raises(bad.error_type) as refusal:
                ours(x)
            assert str(refusal.value) == f"{error} at {type(ours).__name__}"
            tried += 1
        else:
            assert equal([ours(x)], [y])
    assert tried == (2 if training else 1)


# The ONNX backend's tests of its operator BatchNormalization.


class Operator(NamedTuple):
    """One case: attributes; x, scale, bias, mean and var; and what is to come of them."""

    attributes: dict[str, Any]
    inputs: list[np.ndarray]
    outputs: list[np.ndarray]


def operator_cases() -> dict[str, Operator]:
    """Those that onnx generates (they came into being as its module was imported), and those it has as files."""
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
        for size in ("[1, 1]", "[1, 1, 1]"):
            words = f"Expected more than 1 value per channel when training, got input size torch.Size({size})"
            with pytest.raises(ValueError) as error:
                kind(1)(torch.zeros(eval(size)))
            assert str(error.value).startswith(words)
        assert kind(1).eval()(torch.zeros(1, 1)).item() == 0

    def test_a_checkpoint_around_it_moves_the_statistics_twice(self, kind: type[nn.BatchNorm1d]) -> None:
        layer = kind(1).double()
        x = self.x.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(nn.Sequential(layer, nn.Sigmoid()), x, use_reentrant=False).sum().backward()
        assert layer.num_batches_tracked.item() == 2
        assert layer.running_mean.item() == pytest.approx((1 - 0.9**2) * 2, rel=1e-12)


def test_refusals_name_the_layer() -> None:
    network = nn.Sequential()
    network.add_module("features", nn.Sequential(norm.BatchNorm2d(3)))
    messages = {
        (1, 3, 1, 1): "Expected more than 1 value per channel when training, got input size torch.Size([1, 3, 1, 1]) "
        "at features.0 (BatchNorm2d): use batches of two or more, larger images, or freeze() the layer; "
        "for inference call eval()",
        (0, 3, 4, 4): "features.0 (BatchNorm2d) got an empty batch, [0, 3, 4, 4]: "
        "statistics need values; leave the batch out, or call eval() for inference",
        (4, 3, 0, 4): "features.0 (BatchNorm2d) got an empty batch, [4, 3, 0, 4]: "
        "statistics need values; leave the batch out, or call eval() for inference",
        (4, 3): "expected 4D input (got 2D input) at features.0 (BatchNorm2d)",
    }
    for shape, message in messages.items():
        with pytest.raises(ValueError if len(shape) == 2 else norm.TooFewValuesError) as error:
            network(torch.zeros(shape))
        assert str(error.value) == message
    with pytest.raises(RuntimeError) as error:
        network(torch.zeros(4, 5, 2, 2))
    assert str(error.value) == "features.0 (BatchNorm2d) is for 3 channels, and got 5: [4, 5, 2, 2]"
    network.eval()
    for shape in ((1, 3, 1, 1), (0, 3, 4, 4)):
        assert network(torch.zeros(shape)).shape == shape


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
@pytest.mark.parametrize("relu", [False, True])
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
@pytest.mark.parametrize("relu", [False, True])
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
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("compiling", [False, True], ids=["cpu", "device"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_leaves_no_trace(
    layout: torch.memory_format,
    relu: bool,
    momentum: float | None,
    compiling: bool,
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


def test_on_a_device_whose_values_cannot_be_seen() -> None:
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
