import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from bnlab.norm import TooFewValuesError, recalibrate, whitening
from bnlab.norm.whitening import Whitening1d, Whitening2d, inverse_sqrt

EPS = 1e-5
KINDS = pytest.mark.parametrize(
    ("kind", "shape"), [(Whitening1d, (50, 6)), (Whitening1d, (9, 6, 7)), (Whitening2d, (4, 6, 5, 3))], ids=str
)
GROUPS = pytest.mark.parametrize("groups", [1, 2, 3, 6])


def example(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Correlated channels, of unequal scale, with means."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random, dtype=torch.float64)
    mix = torch.eye(shape[1]) + torch.randn(shape[1], shape[1], generator=random, dtype=torch.float64) / 4
    return torch.einsum("ij,nj...->ni...", mix, x) + torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2))


def rows(x: Tensor) -> np.ndarray:
    """All values of each channel, C x m."""
    return x.detach().double().transpose(0, 1).flatten(1).numpy()


def by_the_book(x: Tensor, groups: int, eps: float = EPS) -> np.ndarray:
    """(Sigma + eps I)^(-1/2) (x - mean), group by group, C x m."""
    done = []
    for part in np.split(rows(x), groups):
        centred = part - part.mean(1, keepdims=True)
        covariance = centred @ centred.T / part.shape[1]
        done.append(np.linalg.inv(scipy.linalg.sqrtm(covariance + eps * np.eye(len(part)))) @ centred)
    return np.concatenate(done)


def pair(groups: int, **options: object) -> tuple[Whitening2d, nn.BatchNorm2d]:
    """A whitening layer and torch's batch normalisation, of 6 channels, with the same gamma and beta."""
    ours, theirs = Whitening2d(6, groups=groups, **options).double(), nn.BatchNorm2d(6, **options).double()
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        nn.init.uniform_(parameter, 0.5, 2)
        getattr(ours, name).data.copy_(parameter)
    return ours, theirs


@KINDS
@GROUPS
def test_it_is_the_formula(kind: type[Whitening2d], shape: tuple[int, ...], groups: int) -> None:
    x = example(shape)
    layer = kind(6, groups=groups, dtype=torch.float64)
    assert np.abs(rows(layer(x)) - by_the_book(x, groups)).max() < 1e-10
    single = kind(6, groups=groups)(x.float())
    assert single.dtype == torch.float32
    assert np.linalg.cond(np.cov(rows(x))) < 100
    assert np.abs(rows(single) - by_the_book(x, groups)).max() < 1e-5  # 1e-7 times that


@GROUPS
def test_the_output_is_white(groups: int) -> None:
    y = rows(Whitening2d(6, eps=1e-12, groups=groups, dtype=torch.float64)(example((8, 6, 5, 5))))
    assert np.abs(y.mean(1)).max() < 1e-10
    size = 6 // groups
    for part in np.split(y, groups):
        assert np.abs(part @ part.T / y.shape[1] - np.eye(size)).max() < 1e-8
    assert (
        groups == 1 or np.abs(y @ y.T / y.shape[1] - np.eye(6)).max() > 0.1
    )  # channels of different groups remain correlated


def test_gamma_and_beta_follow() -> None:
    layer, _ = pair(2)
    x = example((4, 6, 5, 3))
    gamma, beta = (p.detach().numpy()[:, None] for p in (layer.weight, layer.bias) if p is not None)
    assert np.abs(rows(layer(x)) - (gamma * by_the_book(x, 2) + beta)).max() < 1e-10


def test_it_is_the_symmetric_whitening() -> None:
    """ZCA: it commutes with rotations, and no other whitening of x is as close to x (Kessy et al. 2018)."""
    x = example((60, 5))
    layer = Whitening1d(5, eps=1e-12, dtype=torch.float64)
    y, centred = layer(x), x - x.mean(0)
    for seed in range(5):
        turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)).double()).Q
        assert (layer(x @ turn.T) - y @ turn.T).abs().max() < 1e-8
        assert (y @ turn.T - centred).norm() > (y - centred).norm() + 1e-3


def test_positions_count_as_examples() -> None:
    x = example((4, 6, 5, 3))
    flat = x.movedim(1, -1).flatten(0, -2)  # m x C
    y = Whitening2d(6, groups=2, dtype=torch.float64)(x)
    assert (y.movedim(1, -1).flatten(0, -2) - Whitening1d(6, groups=2, dtype=torch.float64)(flat)).abs().max() < 1e-12


@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
def test_groups_of_one_channel_are_batch_normalisation(momentum: float | None) -> None:
    ours, theirs = pair(6, momentum=momentum)
    for seed in range(3):
        x, x_other = (example((4, 6, 5, 3), seed).requires_grad_() for _ in range(2))
        y, expected = ours(x), theirs(x_other)
        assert (y - expected).abs().max() < 1e-10
        for layer, out in ((ours, y), (theirs, expected)):
            layer.zero_grad()
            (out**3).mean().backward()
        assert x.grad is not None and x_other.grad is not None
        assert (x.grad - x_other.grad).abs().max() < 1e-10
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            assert (p.grad - q.grad).abs().max() < 1e-10
    assert (ours.running_mean - theirs.running_mean).abs().max() < 1e-12
    assert (ours.running_covariance.flatten() - theirs.running_var).abs().max() < 1e-12
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3
    x = example((4, 6, 5, 3), 9)
    assert (ours.eval()(x) - theirs.eval()(x)).abs().max() < 1e-10


def test_the_running_covariance_is_unbiased() -> None:
    x = example((4, 6, 5, 3))
    layer = Whitening2d(6, momentum=1.0, groups=2, dtype=torch.float64)
    layer(x)
    expected = [np.cov(part) for part in np.split(rows(x), 2)]
    assert np.abs(layer.running_covariance.numpy() - expected).max() < 1e-12
    assert np.abs(layer.running_mean.numpy() - rows(x).mean(1)).max() < 1e-12


def symmetric(eigenvalues: list[float]) -> Tensor:
    vectors = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()).Q
    return vectors @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ vectors.T


@pytest.mark.parametrize(
    "matrix", [torch.eye(3).double(), symmetric([1, 2, 3]), symmetric([2, 2, 5]), symmetric([1, 1 + 1e-9, 1e-2])]
)
def test_the_inverse_root_and_its_gradient(matrix: Tensor) -> None:
    root = inverse_sqrt(matrix)
    assert (root @ matrix @ root - torch.eye(3)).abs().max() < 1e-12
    assert (root - root.mT).abs().max() < 1e-12
    both = torch.stack([matrix, symmetric([3, 4, 4])]).requires_grad_()
    assert torch.autograd.gradcheck(inverse_sqrt, both)


def test_eigenvalues_that_rounding_makes_negative() -> None:
    matrix = symmetric([-1e-9, 1, 1]).requires_grad_()
    root = inverse_sqrt(matrix, 1e-5)
    assert float(torch.linalg.eigvalsh(root.detach()).max()) == pytest.approx(1e-5**-0.5)
    root.sum().backward()
    assert matrix.grad is not None and matrix.grad.isfinite().all()


@pytest.mark.parametrize("groups", [1, 3])
def test_the_layers_gradient(groups: int) -> None:
    layer = Whitening2d(6, groups=groups, track_running_stats=False, dtype=torch.float64)
    x = example((3, 6, 2, 2)).requires_grad_()
    weight, bias = (torch.rand(6, dtype=torch.float64).add(0.5).requires_grad_() for _ in range(2))

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(forward, (x, weight, bias))


def test_the_gradient_where_all_eigenvalues_are_equal() -> None:
    """The input is white already, where the gradient of `torch.linalg.eigh` is NaN."""
    corners = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]).double().requires_grad_()
    layer = Whitening1d(3, dtype=torch.float64, track_running_stats=False)
    assert torch.autograd.gradcheck(layer, corners)


def test_fewer_values_than_channels() -> None:
    x = example((4, 16)).float().requires_grad_()
    layer = Whitening1d(16)
    y = layer(x)
    assert np.abs(rows(y) - by_the_book(x, 1)).max() < 1e-2
    (y**3).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_large_means_do_not_cancel() -> None:
    x = example((16, 6, 5, 3)).float() + 1e6
    layer = Whitening2d(6, momentum=1.0)
    assert np.abs(rows(layer(x)) - by_the_book(x, 1)).max() < 2e-3
    covariance = np.cov(rows(x))
    assert np.abs(layer.running_covariance[0].numpy() - covariance).max() < 1e-5 * covariance.max()
    layer.running_mean.fill_(1e6)
    expected = layer.double().eval()(x.double())
    assert (layer.float()(x) - expected).abs().max() < 2e-3


def test_inference_uses_the_stored_statistics() -> None:
    layer, _ = pair(2)
    for seed in range(3):
        layer(example((4, 6, 5, 3), seed))
    before = copy.deepcopy(layer.state_dict())
    x = example((4, 6, 5, 3), 7)
    y = layer.eval()(x)
    for g in range(2):
        own = slice(3 * g, 3 * g + 3)
        root = np.linalg.inv(scipy.linalg.sqrtm(layer.running_covariance[g].numpy() + EPS * np.eye(3)))
        expected = root @ (rows(x)[own] - layer.running_mean[own].numpy()[:, None])
        expected = layer.weight[own].detach().numpy()[:, None] * expected + layer.bias[own].detach().numpy()[:, None]
        assert np.abs(rows(y)[own] - expected).max() < 1e-10
    assert (layer(x[:1]) - y[:1]).abs().max() < 1e-12
    assert layer(x[:0]).shape == (0, 6, 5, 3)
    assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())


def test_other_statistics() -> None:
    x = example((4, 6, 5, 3))
    layer = Whitening2d(6, statistics="batch", dtype=torch.float64)
    by_batch = layer(x)
    stored = copy.deepcopy(layer.state_dict())
    assert torch.equal(layer.eval()(x), by_batch)
    assert all(torch.equal(t, stored[n]) for n, t in layer.state_dict().items())
    untracked = Whitening2d(6, track_running_stats=False, dtype=torch.float64)
    assert list(untracked.state_dict()) == ["weight", "bias"]
    assert torch.equal(untracked.eval()(x), by_batch)


def test_population_statistics_are_stored_and_outdated() -> None:
    x = example((40, 6))
    layer = Whitening1d(6, groups=2, statistics="population", dtype=torch.float64)
    network = nn.Sequential(layer)
    outdated = r"^0 \(Whitening1d\) has no population statistics for its present weights: .*norm\.recalibrate"
    with pytest.raises(ValueError, match=outdated):
        network.eval()(x)
    recalibrate(layer, [x[:7], x[7:]])
    assert layer.num_batches_tracked == 2
    assert np.abs(layer.running_covariance[1].numpy() - np.cov(rows(x)[3:])).max() < 1e-12
    assert np.abs(rows(layer(x)) - by_the_book(x, 2)).max() < 0.1  # they differ by m and m - 1
    stored = layer.running_covariance.clone(), layer.running_mean.clone()
    network.train()(x + 1)
    assert torch.equal(layer.running_covariance, stored[0]) and torch.equal(layer.running_mean, stored[1])
    with pytest.raises(ValueError, match=outdated):
        network.eval()(x)


def test_freezing_survives_train() -> None:
    layer, _ = pair(3)
    layer(example((4, 6, 5, 3)))
    x = example((4, 6, 5, 3), 1).requires_grad_()
    expected = layer.eval()(x)
    before = copy.deepcopy(layer.state_dict())
    layer.freeze().train()
    y = layer(x)
    assert torch.equal(y, expected)
    (y**2).sum().backward()
    assert x.grad is not None and layer.weight.grad is None and layer.bias.grad is None
    assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())
    layer.unfreeze()(x)
    assert layer.training and layer.num_batches_tracked == 2


def by_loading(layer: Whitening1d, other: Whitening1d) -> Whitening1d:
    layer.load_state_dict(other.state_dict())
    return layer


def by_storing(layer: Whitening1d, other: Whitening1d) -> Whitening1d:
    recalibrate(layer, [example((30, 6), 5)])
    recalibrate(other, [example((30, 6), 5)])
    return layer


def by_data(layer: Whitening1d, other: Whitening1d) -> Whitening1d:
    """Write through `.data`, which does not change the version counter."""
    layer.running_mean.data.copy_(other.running_mean)
    layer.running_covariance.data.copy_(other.running_covariance)
    return layer


def by_training(layer: Whitening1d, other: Whitening1d) -> Whitening1d:
    other.load_state_dict(layer.state_dict())
    for each in (layer, other):
        each.train()(example((30, 6), 6))
        each.eval()
    return layer


def by_eps(layer: Whitening1d, other: Whitening1d) -> Whitening1d:
    other.load_state_dict(layer.state_dict())
    layer.eps = other.eps = 0.5
    return layer


def by_copying(layer: Whitening1d, other: Whitening1d) -> Whitening1d:
    return by_loading(copy.deepcopy(layer), other)


def by_pickling(layer: Whitening1d, other: Whitening1d) -> Whitening1d:
    return by_loading(pickle.loads(pickle.dumps(layer)), other)


@pytest.mark.parametrize(
    "change", [by_loading, by_storing, by_data, by_training, by_eps, by_copying, by_pickling], ids=lambda f: f.__name__
)
def test_the_cached_matrix_is_never_stale(change: Callable[[Whitening1d, Whitening1d], Whitening1d]) -> None:
    layer, other = (Whitening1d(6, dtype=torch.float64) for _ in range(2))
    layer(example((30, 6), 1))
    other(example((30, 6), 2))
    x = example((4, 6), 3)
    before = layer.eval()(x)
    y = change(layer, other)(x)
    assert (y - before).abs().max() > 1e-3
    other._cached_matrix = None
    assert torch.equal(y, other.eval()(x))


def test_inference_decomposes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(whitening, "inverse_sqrt", lambda a, least: calls.append(a.dtype) or inverse_sqrt(a, least))
    layer = Whitening1d(6).eval()
    x = example((4, 6)).float()
    with torch.inference_mode():
        first = layer(x)
    layer(x.requires_grad_()).sum().backward()  # the matrix cached in inference mode allows a backward
    assert torch.equal(layer(x), first) and calls == [torch.float32]
    layer.double()(x.double())
    layer(x.double())
    assert calls == [torch.float32, torch.float64]
    assert layer._cached_matrix is not None and copy.deepcopy(layer)._cached_matrix is None


def test_state_dict_round_trip() -> None:
    layer = Whitening2d(6, groups=2)
    layer(example((4, 6, 5, 3)).float())
    state = layer.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "weight": (6,), "bias": (6,), "running_mean": (6,), "running_covariance": (2, 3, 3), "num_batches_tracked": (),
    }  # fmt: skip
    other = Whitening2d(6, groups=2)
    assert torch.equal(other.running_covariance, torch.eye(3).expand(2, 3, 3))
    other.load_state_dict(state)
    x = example((4, 6, 5, 3), 1).float()
    assert torch.equal(other.eval()(x), layer.eval()(x))
    layer.reset_parameters()
    assert all(torch.equal(t, layer.state_dict()[n]) for n, t in Whitening2d(6, groups=2).state_dict().items())


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("groups", [1, 6])
def test_the_memory_format_is_kept(mode: bool, groups: int) -> None:
    layer = Whitening2d(6, groups=groups, dtype=torch.float64).train(mode)
    x = example((4, 6, 5, 3)).contiguous()
    y, last = layer(x), layer(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert (y - last).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_statistics_in_float32(dtype: torch.dtype) -> None:
    x = example((8, 6, 5, 3)).to(dtype).contiguous(memory_format=torch.channels_last)
    layer, single = Whitening2d(6, momentum=1.0), Whitening2d(6, momentum=1.0)
    y = layer(x)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, single(x.float()).to(dtype))
    assert torch.equal(layer.running_covariance, single.running_covariance)
    assert Whitening2d(6, dtype=dtype)(x).dtype == dtype


def test_autocast_leaves_the_statistics_alone() -> None:
    x = example((8, 6, 5, 3)).float()
    layer, alone = Whitening2d(6), Whitening2d(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert (x.flatten(1) @ x.flatten(1).mT).dtype == torch.bfloat16  # autocast was on
    assert torch.equal(y, alone(x))
    assert torch.equal(layer.running_covariance, alone.running_covariance)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_a_batch_that_is_not_finite_moves_nothing(value: float) -> None:
    layer = Whitening2d(6, groups=2)
    layer(example((4, 6, 5, 3)).float())
    before = copy.deepcopy(layer.state_dict())
    x = example((4, 6, 5, 3)).float()
    x[0, 1, 0, 0] = value
    y = layer(x)
    assert y[:, :3].isnan().all() and y[:, 3:].isfinite().all()  # only its own group
    assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())


def test_every_parameter_learns() -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 3), Whitening2d(6, groups=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    torch.manual_seed(0)
    network(torch.randn(4, 3, 6, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in network.named_parameters() if n != "0.bias")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 6), r"takes N x C x H x W, and got \[2, 6\]: .*Whitening1d for vectors"),
        (torch.zeros(2, 4, 3, 3), r"is for 6 channels, and got 4: \[2, 4, 3, 3\]; .*num_features=4"),
        (torch.zeros(2, 6, 3, 3, dtype=torch.uint8), r"takes floating-point input, not torch.uint8: .*float\(\)"),
    ],
)
def test_inputs_that_are_refused(x: Tensor, message: str) -> None:
    network = nn.Sequential()
    network.add_module("bn", Whitening2d(6))
    with pytest.raises(ValueError, match=rf"^bn \(Whitening2d\) {message}"):
        network(x)
    assert network[0].num_batches_tracked == 0


def test_a_batch_without_a_variance() -> None:
    network = nn.Sequential()
    network.add_module("bn", Whitening2d(6))
    with pytest.raises(TooFewValuesError, match=r"^Expected more than 1 value per channel .* at bn \(Whitening2d\)"):
        network(torch.zeros(1, 6, 1, 1))
    assert network[0].num_batches_tracked == 0


def test_options_that_are_refused() -> None:
    for groups in (4, 0):
        with pytest.raises(ValueError, match=rf"^Whitening2d .* 6 channels into groups={groups}: .*1, 2, 3, 6"):
            Whitening2d(6, groups=groups)
    with pytest.raises(ValueError, match=r"^Whitening1d takes N x C or N x C x L, and got \[2, 6, 3, 3\]"):
        Whitening1d(6)(torch.zeros(2, 6, 3, 3))
    untracked = Whitening1d(6, track_running_stats=False)
    assert recalibrate(untracked, [torch.zeros(3, 6)]).skipped == {"": "it keeps no running statistics"}
    without_eps = Whitening1d(6, eps=0.0)
    with pytest.raises(ValueError, match=r"^Whitening1d needs an eps above 0, not 0\.0"):
        without_eps(torch.zeros(3, 6))
    assert torch.equal(without_eps.eval()(torch.ones(3, 6)), torch.ones(3, 6))


def test_repr() -> None:
    plain = "6, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True"
    assert repr(Whitening2d(6)) == f"Whitening2d({plain}, groups=1)"
    layer = Whitening1d(6, groups=3, statistics="population").freeze()
    assert repr(layer) == f"Whitening1d({plain}, groups=3, statistics='population', frozen)"


def test_on_the_meta_device() -> None:
    layer = Whitening2d(6, groups=2, device="meta")
    for mode in (True, False, False):
        assert layer.train(mode)(torch.empty(2, 6, 3, 3, device="meta")).shape == (2, 6, 3, 3)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its compiler
@pytest.mark.parametrize("mode", [True, False])
def test_it_compiles_in_one_piece(mode: bool) -> None:
    layer, x = Whitening2d(6, groups=2), example((4, 6, 5, 3)).float()
    layer.eval()(x)  # fills the cache, which compiled code must not read
    layer.train(mode)
    expected = copy.deepcopy(layer)(x)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)
