import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bnlab import norm
from bnlab.norm import BatchNorm2d, kernels
from bnlab.norm.save_memory import batch_norm_relu, save_memory

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
KINDS = pytest.mark.parametrize(
    "kind", [{}, {"bias": False}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=str
)

# Functions that read y; each keeps it, or part of it, for its backward.
READERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "convolution": F.conv2d,
    "two convolutions": lambda y, w: F.conv2d(y, w) * F.conv2d(y, w.flip(0)),
    "linear": lambda y, w: F.linear(y.movedim(1, -1), w[:, :, 0, 0]),
    "max pooling": lambda y, w: F.conv2d(F.max_pool2d(y, 2), w),
    "concatenation": lambda y, w: F.conv2d(torch.cat([y, y * y], 1), torch.cat([w, w], 1)),
    "concatenation of nothing else": lambda y, w: F.conv2d(torch.cat([y, y], -3), torch.cat([w, w], 1)),
    "itself": lambda y, w: y * y,
    "nothing": lambda y, w: y.sum((2, 3)),
}


class BNReLU(nn.Module):
    """The layer under test, or torch's and its ReLU."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, relu=True) if isinstance(self.layer, norm.BatchNorm2d) else torch.relu(self.layer(x))


def pair(kind: dict[str, object], dtype: torch.dtype) -> tuple[BNReLU, BNReLU]:
    """Ours and torch's, with the same weights."""
    torch.manual_seed(1)
    ours, theirs = norm.BatchNorm2d(3, **kind).to(dtype), nn.BatchNorm2d(3, **kind).to(dtype)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    return BNReLU(ours), BNReLU(theirs)


def example(dtype: torch.dtype, layout: torch.memory_format, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """An input, and the weight of a convolution."""
    torch.manual_seed(0)
    x = (torch.randn(4, 3, 8, 8, dtype=dtype) + offset).to(memory_format=layout)
    return x, torch.randn(5, 3, 3, 3, dtype=dtype)


def step(network: BNReLU, reader: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> list[Tensor]:
    """Output, all gradients and statistics of one training step."""
    x, w = x.clone(memory_format=torch.preserve_format).requires_grad_(), w.clone().requires_grad_()
    network.zero_grad()
    # The gradient of x * 2 + 1 shows that dy is passed on correctly.
    z = reader(network(x * 2 + 1), w)
    z.backward(torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape))
    grads = [t.grad for t in (x, w, *network.parameters()) if t.grad is not None]
    return [z.detach(), *grads, *network.buffers()]


@LAYOUTS
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize(("saving", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.float64)])
def test_it_is_torchs_layer_and_relu_to_the_bit(
    layout: torch.memory_format, reader: Callable[[Tensor, Tensor], Tensor], saving: bool, dtype: torch.dtype
) -> None:
    ours, theirs = pair({}, dtype)
    x, w = example(dtype, layout)
    for number in range(2):
        expected = step(theirs, reader, x + number, w)
        with save_memory() if saving else nullcontext():
            found = step(ours, reader, x + number, w)
        assert len(found) == len(expected) >= 7
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


@LAYOUTS
@KINDS
def test_every_kind_of_layer_is_as_torchs(layout: torch.memory_format, kind: dict[str, object]) -> None:
    ours, theirs = pair(kind, torch.float32)
    x, w = example(torch.float32, layout)
    expected = step(theirs, READERS["convolution"], x, w)
    with save_memory():
        found = step(ours, READERS["convolution"], x, w)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_the_layout_is_kept() -> None:
    ours, _ = pair({}, torch.float32)
    x, _ = example(torch.float32, torch.channels_last)
    y = ours(x.requires_grad_())
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "pure"])
@pytest.mark.parametrize("affine", [True, False])
def test_half_precision(dtype: torch.dtype, mixed: bool, affine: bool) -> None:
    """Pure half precision keeps two tensors; its results are torch's too."""
    ours, theirs = pair({"affine": affine}, torch.float32 if mixed else dtype)
    x, w = example(dtype, torch.contiguous_format)
    expected = step(theirs, READERS["convolution"], x, w)
    with save_memory():
        found = step(ours, READERS["convolution"], x, w)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@LAYOUTS
def test_far_from_0_it_is_the_layer_and_a_relu(layout: torch.memory_format) -> None:
    one, other = pair({}, torch.float32)[0].layer, pair({}, torch.float32)[0].layer
    x, w = example(torch.float32, layout, offset=1e5)
    x, x_other = x.clone().requires_grad_(), x.clone().requires_grad_()
    with save_memory():
        F.conv2d(one(x, relu=True), w).square().sum().backward()
    F.conv2d(torch.relu(other(x_other)), w).square().sum().backward()
    assert torch.equal(x.grad, x_other.grad)
    assert torch.equal(one.weight.grad, other.weight.grad)
    assert torch.equal(one.running_mean, other.running_mean)
    assert torch.equal(one.running_var, other.running_var)


@pytest.mark.parametrize("offset", [0.0, 500.0])
@pytest.mark.parametrize("saving", [False, True], ids=["plain", "saving"])
def test_gradients_and_their_gradients(offset: float, saving: bool) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 2, 3, 3, dtype=torch.float64) + offset).requires_grad_()
    gamma, beta = (torch.rand(2, dtype=torch.float64).requires_grad_() for _ in range(2))
    w = torch.randn(2, 2, 2, 2, dtype=torch.float64).requires_grad_()

    def network(x: Tensor, gamma: Tensor, beta: Tensor, w: Tensor) -> Tensor:
        y, moved = batch_norm_relu(x, gamma, beta, None, 1e-5)
        assert moved is False
        return F.conv2d(y, w)

    def within(*leaves: Tensor) -> Tensor:
        with save_memory():
            return network(*leaves)

    f = within if saving else network
    assert torch.autograd.gradcheck(f, (x, gamma, beta, w), atol=1e-4)
    assert torch.autograd.gradgradcheck(f, (x, gamma, beta, w), atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("without", ["x", "gamma", "beta", "x and gamma"])
def test_some_leaves_without_gradient(without: str) -> None:
    torch.manual_seed(0)
    leaves = {"x": torch.randn(4, 3, 5, 5), "gamma": torch.rand(3), "beta": torch.rand(3)}
    wanted = [leaf.requires_grad_() for name, leaf in leaves.items() if name not in without.split(" and ")]
    y, _ = batch_norm_relu(*leaves.values(), None, 1e-5)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, wanted, dy)
    plain = F.relu(F.batch_norm(leaves["x"], None, None, leaves["gamma"], leaves["beta"], training=True))
    for one, other in zip(found, torch.autograd.grad(plain, wanted, dy), strict=True):
        assert torch.equal(one, other)


class HeldTensors:
    """Which tensors of a forward are still held, by weak references to their storages."""

    def __init__(self) -> None:
        self.storages: dict[str, weakref.ref] = {}

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        self.storages[name] = weakref.ref(tensor.untyped_storage())
        return tensor

    @property
    def held(self) -> set[str]:
        gc.collect(1)  # the young generation alone, since the older one takes a second
        return {name for name, storage in self.storages.items() if storage() is not None}


def forward(network: BNReLU, tensors: HeldTensors, reader: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    x, w = example(torch.float32, torch.channels_last)
    h = tensors("h", x * torch.ones(1, requires_grad=True))
    y = tensors("y", network(h))
    return reader(y, w.requires_grad_())


def sums(y: Tensor, w: Tensor) -> Tensor:
    return y.sum()


@pytest.mark.parametrize(
    ("reader", "theirs", "plainly", "saving"),
    [
        (READERS["convolution"], {"h", "y"}, {"h", "y"}, {"h"}),
        (READERS["itself"], {"h", "y"}, {"h", "y"}, {"h"}),
        (READERS["two convolutions"], {"h", "y"}, {"h", "y"}, {"h"}),
        (sums, {"h", "y"}, {"h"}, {"h"}),
    ],
    ids=["convolution", "itself", "two convolutions", "sum"],
)
def test_tensors_kept_for_backward(
    reader: Callable[[Tensor, Tensor], Tensor], theirs: set[str], plainly: set[str], saving: set[str]
) -> None:
    ours, torchs = pair({}, torch.float32)
    tensors = HeldTensors()
    z = forward(torchs, tensors, reader)
    assert tensors.held == theirs
    z = forward(ours, tensors, reader)
    assert tensors.held == plainly
    with save_memory():
        z = forward(ours, tensors, reader)
    assert tensors.held == saving
    z.sum().backward()
    assert tensors.held == set()


def test_a_chain_of_layers_keeps_only_the_first_input() -> None:
    ours, other = pair({}, torch.float32)[0], pair({}, torch.float32)[0]
    tensors = HeldTensors()
    with save_memory():
        z = forward(ours, tensors, lambda y, w: F.conv2d(tensors("second", other(y)), w))
    assert tensors.held == {"h"}
    del z
    assert tensors.held == set()


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize(
    "after",
    [
        *(torch.sigmoid, torch.exp, torch.relu, torch.sqrt, lambda y: y.softmax(1)),  # these keep their outputs
        lambda y: y * y,
        lambda y: F.conv2d(torch.cat([y, y], 1), torch.ones(1, 6, 1, 1, requires_grad=True)),
    ],
    ids=["sigmoid", "exp", "relu", "sqrt", "softmax", "square", "concatenation"],
)
def test_nothing_leaks(backward: bool, after: Callable[[Tensor], Tensor]) -> None:
    """Not even if backward is never called."""
    ours, _ = pair({}, torch.float32)
    tensors = HeldTensors()
    with save_memory():
        z = forward(ours, tensors, lambda y, w: tensors("after", after(y)).sum() + after(y + 1).sum())
    assert "h" in tensors.held
    if backward:
        z.backward()
    del z
    assert tensors.held == set()


def tensors_like(x: Tensor) -> int:
    return sum(type(thing) is Tensor and thing.shape == x.shape for thing in gc.get_objects())


def test_a_retained_graph_gives_the_same_gradients_again_and_keeps_no_y() -> None:
    ours, _ = pair({}, torch.float32)
    x, w = example(torch.float32, torch.channels_last)
    x.requires_grad_()
    with save_memory():
        z = READERS["two convolutions"](ours(x), w.requires_grad_()).square().sum()
    before = tensors_like(x)
    one = torch.autograd.grad(z, (w, ours.layer.weight), retain_graph=True)
    assert tensors_like(x) == before
    (part,) = torch.autograd.grad(z, w, retain_graph=True)
    other = torch.autograd.grad(z, (w, ours.layer.weight))
    assert torch.equal(part, one[0])
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def test_running_statistics_move_once() -> None:
    x, w = example(torch.float32, torch.contiguous_format)
    ours, _ = pair({}, torch.float32)
    with save_memory():
        z = F.conv2d(ours(x.requires_grad_()), w.requires_grad_())
    z.sum().backward()
    assert ours.layer.num_batches_tracked == 1
    once = nn.BatchNorm2d(3)
    once(x)
    assert torch.equal(ours.layer.running_mean, once.running_mean)


def no_grad(change: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    """A change in place that only y's version counter shows, such as added noise."""

    def changed(y: Tensor) -> Tensor:
        with torch.no_grad():
            change(y)
        return y

    return changed


def gradients_in_place(
    change: Callable[[Tensor], Tensor], network: BNReLU, reader: Callable[[Tensor, Tensor], Tensor], *, before: bool
) -> list[Tensor]:
    """The gradients of layers that read y after its change or, with `before`, both before and after."""
    x, w = example(torch.float64, torch.contiguous_format)
    leaves = [x.requires_grad_(), w.requires_grad_(), *network.parameters()]
    y = network(x * 1)
    z = reader(y, w) if before else torch.zeros((), dtype=torch.float64)
    z = z + reader(change(y), w * 2)
    return list(torch.autograd.grad(z.square().sum(), leaves))


# Changes in place, each with the equal change out of place.
CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "add_": (lambda y: y.add_(1), lambda y: y + 1),
    "mul_": (lambda y: y.mul_(-2), lambda y: y * -2),
    "relu_": (lambda y: y.relu_(), lambda y: y.relu()),
    "a view": (lambda y: (y[:, :1].fill_(3), y)[1], lambda y: torch.cat([y[:, :1] * 0 + 3, y[:, 1:]], 1)),
    "detached": (lambda y: (y.detach().add_(1), y)[1], lambda y: y + 1),
    "without grad": (no_grad(lambda y: y.add_(1)), lambda y: y + 1),
}


@pytest.mark.parametrize("before", [False, True], ids=["read after", "read before too"])
@pytest.mark.parametrize("reader", ["convolution", "concatenation", "concatenation of nothing else"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_gives_the_right_gradient_or_an_error(change: str, reader: str, before: bool) -> None:
    ours, theirs = pair({}, torch.float64)
    in_place, out_of_place = CHANGES[change]
    expected = gradients_in_place(out_of_place, theirs, READERS[reader], before=before)
    try:
        with save_memory():
            found = gradients_in_place(in_place, ours, READERS[reader], before=before)
    except RuntimeError as error:
        assert "was changed in place after it was saved" in str(error)
        assert reader == "concatenation"  # it keeps a square, which cannot be recomputed
        assert before
        return
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-9 * other.abs().max()


def test_a_concatenation_that_is_changed_in_place() -> None:
    ours, theirs = pair({}, torch.float64)
    x, w = example(torch.float64, torch.contiguous_format)
    w = torch.cat([w, w], 1).requires_grad_()
    with save_memory():
        both = no_grad(lambda t: t.add_(1))(torch.cat([ours(x)] * 2, 1))
        (found,) = torch.autograd.grad(F.conv2d(both, w).square().sum(), w)
    (expected,) = torch.autograd.grad(F.conv2d(torch.cat([theirs(x)] * 2, 1) + 1, w).square().sum(), w)
    assert torch.equal(found, expected)


def test_a_kept_tensor_that_is_changed_in_place_is_an_error() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    with save_memory():
        y = x * 2
        z = (y * y).sum()
    y.detach().add_(1)
    with pytest.raises(
        RuntimeError, match=r"shape \[2, 3\] .* changed in place .* out of place, or outside of save_memory"
    ):
        z.backward()


def test_nothing_is_kept_without_a_graph() -> None:
    ours, theirs = pair({}, torch.float32)
    x, _ = example(torch.float32, torch.contiguous_format)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.layer.running_mean, theirs.layer.running_mean)
    ours.eval(), theirs.eval()
    assert torch.equal(ours(x), theirs(x))
    with torch.inference_mode(), save_memory():
        assert torch.equal(ours(x), theirs(x))


def test_a_batch_that_is_not_finite_moves_nothing_and_has_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair({}, torch.float32)
    x, w = example(torch.float32, torch.channels_last)
    x[0, 0, 0, 0] = torch.nan
    before = [buffer.clone() for buffer in ours.buffers()]
    with save_memory():
        step(ours, READERS["convolution"], x, w)
    for one, other in zip(ours.buffers(), before, strict=True):
        assert torch.equal(one, other)
    assert ours.layer.weight.grad.isnan().any()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # takes the path of a GPU
    step(ours, READERS["convolution"], x, w)
    for one, other in zip(ours.buffers(), before, strict=True):
        assert torch.equal(one, other)
    x, w = example(torch.float32, torch.channels_last)
    for one, other in zip(
        step(ours, READERS["convolution"], x, w), step(theirs, READERS["convolution"], x, w), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("relu", [False, True])
def test_compiled(relu: bool) -> None:
    """In one graph; the compiler decides what to keep."""
    (ours, _), (same, _) = pair({}, torch.float32), pair({}, torch.float32)
    x, _ = example(torch.float32, torch.contiguous_format)
    compiled = torch.compile(ours.layer, backend="aot_eager", fullgraph=True)
    for bad in (False, True):
        x = x.detach().clone()
        x[0, 0, 0, 0] = torch.nan if bad else 0
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled(one, relu=relu).square().sum().backward()
        same.layer(other, relu=relu).square().sum().backward()
        assert torch.allclose(one.grad, other.grad, rtol=0, atol=1e-6, equal_nan=True)
        assert ours.layer.num_batches_tracked == 1
        assert torch.allclose(ours.layer.running_var, same.layer.running_var)


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_within_torchs_checkpoint(saving: bool, reentrant: bool) -> None:
    """It allows each saved tensor to be read only once."""
    found = []
    for plain in (True, False):
        torch.manual_seed(0)
        bn = nn.BatchNorm2d(3) if plain else norm.BatchNorm2d(3)
        conv = nn.Conv2d(3, 4, 3)
        x = torch.randn(4, 3, 8, 8, requires_grad=True)

        def block(x: Tensor, bn: nn.Module = bn, conv: nn.Module = conv, plain: bool = plain) -> Tensor:
            return conv(bn(x).relu() if plain else bn(x, relu=True))

        with norm.save_memory() if saving else nullcontext():
            y = checkpoint(block, x, use_reentrant=reentrant)
        y.square().sum().backward()
        found.append([x.grad, conv.weight.grad, bn.weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_within_other_saved_tensor_hooks() -> None:
    kept = []
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: (kept.append(t), t)[1]):
        norm.BatchNorm2d(3)(x, relu=True).sum().backward()
    assert len(kept) == 5  # each read once


def test_enabled_gradients_within_inference_mode() -> None:
    with torch.inference_mode(), torch.enable_grad():
        x = torch.randn(4, 3, 8, 8)
        assert torch.equal(norm.BatchNorm2d(3)(x, relu=True), nn.BatchNorm2d(3)(x).relu())


def test_under_torch_func() -> None:
    x = torch.randn(4, 3, 8, 8)
    own, plain = norm.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3, track_running_stats=False)
    weights = torch.randn(4, 3, 8, 8)
    found = torch.func.grad(lambda x: (own(x, relu=True) * weights).sum())(x)
    torch.testing.assert_close(found, torch.func.grad(lambda x: (plain(x).relu() * weights).sum())(x))


def test_an_output_is_recomputed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for both the layer that reads it and its own backward."""
    calls = 0
    real = kernels.recompute

    def counting(*arguments: object) -> Tensor:
        nonlocal calls
        calls += 1
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "recompute", counting)
    convs = [nn.Conv2d(3, 3, 3) for _ in range(3)]
    bns = [BatchNorm2d(3) for _ in range(2)]
    x = torch.randn(4, 3, 12, 12)
    with save_memory():
        y = convs[0](x)
        for bn, conv in zip(bns, convs[1:], strict=True):
            y = conv(bn(y, relu=True))
    y.square().sum().backward()
    assert calls == 2
