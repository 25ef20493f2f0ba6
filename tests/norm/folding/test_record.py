"""What a recording shows: which layers ran, what read their outputs, and what other sizes of the example do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnlab.norm.folding.check import run
from bnlab.norm.folding.flow import readers
from bnlab.norm.folding.fold import fold
from bnlab.norm.folding.record import record


class Net(nn.Module):
    """A loop that no trace can follow, then the given forward."""

    def __init__(self, then: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.then = then
        self.conv, self.bn, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        nn.init.uniform_(self.bn.running_var, 0.1, 2)  # type: ignore[arg-type]
        nn.init.normal_(self.bn.running_mean)  # type: ignore[arg-type]
        self.eval()

    def forward(self, x: Tensor) -> Any:
        for _ in range(x.shape[0]):
            x = x * 1
        return self.then(self, x)


def images() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def test_a_recording_has_the_layers_and_the_operations_between_them() -> None:
    model = Net(lambda net, x: net.bn(net.conv(x)).relu() + net.other(x))
    region = record(model, run, (images(),))
    assert len(region.graphs) == 4  # the example, one image, the batch twice, smaller images
    graph = region.graphs[0]
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["conv", "bn", "other"]
    conv = next(node for node in graph.nodes if node.target == "conv")
    assert [node.target for node in readers(conv)] == ["bn"]
    assert region.called(conv) is model.conv and region.name == "the model" and not region.read
    operations = [region.describe(node) for node in graph.nodes if node.op == "call_function"]
    assert operations[-2:] == ["relu()", "add()"]


def stores(net: Any, x: Tensor) -> Tensor:
    net.stored = [net.conv(x)]
    return net.bn(net.stored[0])


USED = "the output of conv (Conv2d) before it is also used elsewhere"
CALLED = "conv (Conv2d) before it is also called elsewhere"
READ = "the parameters of conv (Conv2d) before it are also used elsewhere"
CASES: dict[str, tuple[Callable[[Any, Tensor], Any], str | None]] = {
    "alone": (lambda n, x: n.bn(n.conv(x)), None),
    "shape": (lambda n, x: n.bn(h := n.conv(x)) * h.shape[0] * h.dim(), None),
    "image by image": (lambda n, x: torch.cat([n.bn(n.conv(one)) for one in x.split(1)]), None),
    "concatenation": (lambda n, x: n.bn(torch.cat([n.conv(x)[:, :0] + 1, n.conv(x)], 1)), "add() comes before it, not "
                      "a convolution or linear layer"),
    "read again": (lambda n, x: n.bn(h := n.conv(x)) + h, USED),
    "a view": (lambda n, x: n.bn(h := n.conv(x)) + h.view(-1)[0], USED),
    "a number": (lambda n, x: n.bn(h := n.conv(x)) + float(h[0, 0, 0, 0]), USED),
    "returned": (lambda n, x: (n.bn(h := n.conv(x)), h), USED),
    "stored": (stores, USED),
    "in place": (lambda n, x: n.bn(n.conv(x).mul_(2)), "mul_() comes before it, not a convolution or linear layer"),
    "in place, and then by its old name": (
        lambda n, x: (h := n.conv(x), h[0].mul_(2), n.bn(h))[2],
        "mul_() comes before it, not a convolution or linear layer",
    ),
    "called again": (lambda n, x: n.bn(n.conv(x)) + n.conv(x), CALLED),
    "weights": (lambda n, x: n.bn(n.conv(x)) + n.conv.weight.sum(), READ),
    "weights, viewed": (lambda n, x: n.bn(n.conv(x)) + n.conv.weight.flatten()[0], READ),
    "statistics": (
        lambda n, x: n.bn(n.conv(x)) + n.bn.running_var.sum(),
        "its parameters or statistics are also used elsewhere",
    ),
    "another layer": (lambda n, x: n.bn(n.conv(x)) + n.bn(n.other(x)), "it is called after different layers"),
    "of one image": (lambda n, x: n.bn(n.conv(x)) if x.shape[0] > 1 else n.conv(x), CALLED),
    "of more images": (lambda n, x: n.bn(n.conv(x)) if x.shape[0] < 5 else n.conv(x), CALLED),
    "of smaller images": (lambda n, x: n.bn(n.conv(x)) if x.shape[2] > 5 else n.conv(x), CALLED),
    "never": (lambda n, x: n.conv(x), "inference never reaches it"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_folded_by_an_example(case: str) -> None:
    then, reason = CASES[case]
    model, x = Net(then), images()
    folding = fold(model, x)
    assert folding.kept == ({} if reason is None else {"bn": reason})
    with torch.no_grad():
        torch.testing.assert_close(folding.model(x), model(x), rtol=1e-4, atol=1e-4)


def test_sizes_that_the_model_does_not_take_are_left_out() -> None:
    def then(net: Any, x: Tensor) -> Tensor:
        if len(x) != 4:
            raise ValueError("four images")
        return net.bn(net.conv(x))

    model = Net(then)
    assert len(record(model, run, (images(),)).graphs) == 2
    assert fold(model, images()).folded == {"bn": ("conv",)}


def test_hooks_that_read_a_value_are_seen() -> None:
    model = Net(lambda net, x: net.bn(net.inner(x)))
    model.inner = nn.Sequential(nn.Conv2d(3, 3, 1))
    model.inner.register_forward_hook(lambda *_: None)
    assert fold(model.eval(), images()).kept == {"bn": "a hook reads the output of inner.0 (Conv2d) before it"}


def test_recording_changes_nothing() -> None:
    def then(net: Any, x: Tensor) -> Tensor:
        net.count = getattr(net, "count", 0) + 1
        net.bn.running_mean.add_(1)
        return net.bn(net.conv(x.add_(1)))

    model, x = Net(then), images()
    before = model.bn.running_mean.clone()  # type: ignore[union-attr]
    record(model, run, (x,))
    assert torch.equal(before, model.bn.running_mean) and torch.equal(x, images())  # type: ignore[arg-type]
    assert not hasattr(model, "count") and not model.conv._forward_hooks
