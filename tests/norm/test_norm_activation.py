import pytest
import torch
from torch import nn

from bnlab.norm import BatchNorm2d, NormActivation


def x() -> torch.Tensor:
    return torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm2d])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid])
def test_order(norm: type[nn.BatchNorm2d], activation: type[nn.Module]) -> None:
    assert torch.equal(NormActivation(norm(3), activation())(x()), activation()(nn.BatchNorm2d(3)(x())))
    assert torch.equal(NormActivation(norm(3), activation(), "after")(x()), nn.BatchNorm2d(3)(activation()(x())))


def test_both_orders_have_the_same_state_dict() -> None:
    before, after = NormActivation(BatchNorm2d(3), nn.PReLU()), NormActivation(BatchNorm2d(3), nn.PReLU(), "after")
    assert before.state_dict().keys() == after.state_dict().keys()
    after.load_state_dict(before.state_dict())
    assert [name for name, _ in after.named_children()] == ["activation", "norm"]


def test_relu_after_bnlabs_layer_keeps_one_tensor() -> None:
    kept: list[torch.Tensor] = []
    batch = x().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        NormActivation(BatchNorm2d(3), nn.ReLU())(batch)
    assert sum(t.numel() == batch.numel() for t in kept) == 1


def test_hooks_see_both_parts() -> None:
    norm_activation, calls = NormActivation(BatchNorm2d(3), nn.ReLU()), []
    norm_activation.activation.register_forward_hook(lambda *_: calls.append(1))
    norm_activation(x())
    assert calls == [1]
    norm_activation, seen = NormActivation(BatchNorm2d(3), nn.ReLU()), []
    norm_activation.norm.register_forward_hook(lambda _, args, y: seen.append(y.min()))
    norm_activation(x())
    assert seen[0] < 0  # before ReLU


def test_refusal() -> None:
    with pytest.raises(ValueError, match="'before' or 'after' the activation, not 'behind'"):
        NormActivation(BatchNorm2d(3), nn.ReLU(), "behind")


def test_a_subclass_with_a_forward_gets_no_other_argument() -> None:
    class Doubled(BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(input) * 2

    torch.testing.assert_close(NormActivation(Doubled(3), nn.ReLU())(x()), nn.BatchNorm2d(3)(x()).relu() * 2)
