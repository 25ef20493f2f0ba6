"""`load_weights`: which files fit which networks, what is reported, and that a refusal changes nothing."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from bnlab.errors import BnlabError, ClassifierError, UsageError
from bnlab.nets.load_weights import WeightsLoaded, load_weights

State = dict[str, Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))


def filled(model: nn.Module, seed: int = 1) -> State:
    """A state_dict with other values than the model's."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else torch.tensor(7)
        for name, tensor in model.state_dict().items()
    }


def values(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def load(model: nn.Module, saved: object, folder: Path, **options: str) -> WeightsLoaded:
    torch.save(saved, folder / "w.pt")
    return load_weights(model, folder / "w.pt", **options)  # type: ignore[arg-type]


def refusal(model: nn.Module, saved: object, folder: Path, **options: str) -> BnlabError:
    before = values(model)
    with pytest.raises(BnlabError) as error:
        load(model, saved, folder, **options)
    assert "\n" not in str(error.value)
    assert "w.pt" in str(error.value)
    assert_equal(values(model), before)
    return error.value


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def test_a_state_dict_fits_without_remarks(tmp_path: Path) -> None:
    model = Net()
    state = filled(model)
    done = load(model, state, tmp_path)
    assert_equal(model.state_dict(), state)
    assert done == WeightsLoaded(
        tensors=8, prefix="", missing_statistics=(), extra_statistics=(), other_dtypes={}, others=()
    )


def test_safetensors(tmp_path: Path) -> None:
    model = Net()
    state = filled(model)
    safetensors.torch.save_file(under("model.", state), tmp_path / "w.safetensors", {"bnlab": "{}"})
    assert load_weights(model, tmp_path / "w.safetensors").prefix == "model."
    assert_equal(model.state_dict(), state)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", "model_ema", "weights"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.backbone."])
def test_keys_of_checkpoints_and_prefixes(tmp_path: Path, key: str, prefix: str) -> None:
    model = Net()
    state = filled(model)
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(4, 3, 3, 3)}}, "param_groups": [{"lr": 0.1}]}
    done = load(model, {key: under(prefix, state), "optimizer": optimizer, "epoch": 3}, tmp_path)
    assert (done.prefix, done.tensors, done.others) == (prefix, 8, ())
    assert_equal(model.state_dict(), state)


def test_wrappers_in_the_middle_of_a_name_and_around_the_model(tmp_path: Path) -> None:
    model = Net()
    state = filled(model)
    parallel = {name.replace("head.", "head.module."): tensor for name, tensor in state.items()}
    assert load(model, parallel, tmp_path).prefix == ""
    assert_equal(model.state_dict(), state)
    wrapped = nn.DataParallel(Net())
    load(wrapped, state, tmp_path)
    assert_equal(wrapped.module.state_dict(), state)
    assert load(wrapped, {"ema": under("module.", state), "epoch": 1}, tmp_path).tensors == 8
    assert load(wrapped, under("net.module.", filled(model, 2)), tmp_path).prefix == "net."
    assert_equal(wrapped.module.state_dict(), filled(model, 2))


def test_tensors_outside_of_the_prefix_are_named(tmp_path: Path) -> None:
    """Those of torch's AveragedModel: its counter is not part of the network."""
    model = Net()
    averaged = torch.optim.swa_utils.AveragedModel(Net(), use_buffers=True)
    done = load(model, averaged.state_dict(), tmp_path)
    assert (done.prefix, done.others) == ("module.", ("n_averaged",))
    assert_equal(model.state_dict(), averaged.module.state_dict())


def test_of_several_sets_one_is_chosen(tmp_path: Path) -> None:
    model = Net()
    state, average = filled(model, 1), filled(model, 2)
    saved = {"model": under("module.", state), "ema": average, "epoch": 3}
    error = refusal(model, saved, tmp_path)
    assert "holds 2 sets of weights that fit, with the prefix 'ema.' and the prefix 'model.module.'" in error.problem
    done = load(model, saved, tmp_path, prefix="ema.")
    assert (done.prefix, len(done.others)) == ("ema.", 8)
    assert_equal(model.state_dict(), average)
    load(model, saved, tmp_path, prefix="model.module.")
    assert_equal(model.state_dict(), state)
    error = refusal(model, saved, tmp_path, prefix="model.")
    assert isinstance(error, UsageError)
    assert error.remedy == "pass the prefix 'model.module.'"
    assert refusal(model, state, tmp_path, prefix="module.").remedy == "pass no prefix"


def test_a_set_for_another_network_does_not_count(tmp_path: Path) -> None:
    """A generator beside its discriminator."""
    model = Net()
    state = filled(model)
    done = load(model, {"g": filled(nn.Linear(2, 2)), "d": state}, tmp_path)
    assert (done.prefix, done.others) == ("d.", ("g.weight", "g.bias"))
    assert_equal(model.state_dict(), state)


@pytest.mark.parametrize(
    "lacking",
    [("num_batches_tracked",), ("running_var",), ("running_mean", "running_var", "num_batches_tracked")],
    ids=["counter", "variance", "all"],
)
def test_statistics_that_the_file_lacks_keep_their_values(tmp_path: Path, lacking: tuple[str, ...]) -> None:
    model = Net()
    model.bn.running_mean = torch.full((4,), 3.0)
    before, state = values(model), filled(model)
    names = tuple(f"bn.{name}" for name in lacking)
    for name in names:
        del state[name]
    done = load(model, {"state_dict": under("module.", state)}, tmp_path)
    assert sorted(done.missing_statistics) == sorted(names)
    assert (done.prefix, done.extra_statistics) == ("module.", ())
    assert_equal(model.state_dict(), state | {name: before[name] for name in names})


def test_statistics_that_the_network_does_not_keep(tmp_path: Path) -> None:
    for layer in (nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4)):
        model = Net()
        state = filled(model)
        model.bn = layer  # type: ignore[assignment]
        done = load(model, under("module.", state), tmp_path)
        assert done.extra_statistics == (
            "module.bn.running_mean", "module.bn.running_var", "module.bn.num_batches_tracked",
        )  # fmt: skip
        assert done.tensors == 5
        assert torch.equal(model.bn.weight, state["bn.weight"])


def test_statistics_of_a_layer_that_is_not_there_are_unexpected(tmp_path: Path) -> None:
    model = Net()
    assert "1 tensor is unexpected (bn9.running_mean)" in str(
        refusal(model, filled(model) | {"bn9.running_mean": torch.zeros(4)}, tmp_path)
    )


def test_other_buffers_must_be_there(tmp_path: Path) -> None:
    model = Net()
    model.register_buffer("offset", torch.zeros(2))
    state = filled(model)
    del state["offset"]
    assert "1 tensor is missing (offset)" in str(refusal(model, state, tmp_path))


def test_other_dtypes_are_converted_and_named(tmp_path: Path) -> None:
    model = Net()
    state = filled(model)
    halves = state | {"conv.weight": state["conv.weight"].half(), "bn.num_batches_tracked": torch.tensor(7.5)}
    done = load(model, halves, tmp_path)
    assert done.other_dtypes == {"conv.weight": "float16", "bn.num_batches_tracked": "float32"}
    assert model.conv.weight.dtype == torch.float32
    assert torch.equal(model.conv.weight, state["conv.weight"].half().float())
    assert model.bn.num_batches_tracked == torch.tensor(7)


def test_a_counter_with_one_dimension(tmp_path: Path) -> None:
    model = Net()
    load(model, filled(model) | {"bn.num_batches_tracked": torch.tensor([9])}, tmp_path)
    assert model.bn.num_batches_tracked == torch.tensor(9)


def test_mismatches_are_named_and_counted(tmp_path: Path) -> None:
    model = Net()
    state = filled(model)
    del state["bn.weight"]
    state |= {f"aux.{n}": torch.zeros(1) for n in range(5)}
    state["head.1.weight"] = torch.zeros(10, 4)
    error = refusal(model, under("module.", state), tmp_path)
    assert isinstance(error, ClassifierError)
    assert error.problem.endswith(
        "w.pt does not fit Net: 1 tensor is missing (bn.weight); 5 tensors are unexpected (module.aux.0, module.aux.1, "
        "module.aux.2, ...); 1 tensor has another shape (module.head.1.weight is 10 x 4, not 2 x 4)"
    )


def test_a_missing_and_an_unexpected_tensor_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model = Net()
    state = filled(model)
    state["bn.gamma"] = state.pop("bn.weight")
    error = refusal(model, state, tmp_path)
    assert "1 tensor is missing (bn.weight); 1 tensor is unexpected (bn.gamma)" in error.problem


def test_a_file_of_quite_another_network(tmp_path: Path) -> None:
    error = refusal(Net(), {"layer4.0.conv1": torch.zeros(3, 3)}, tmp_path)
    assert "5 tensors are missing (conv.weight, bn.weight, bn.bias, ...)" in error.problem
    assert "1 tensor is unexpected (layer4.0.conv1)" in error.problem


def test_both_names_of_a_tensor_in_one_file(tmp_path: Path) -> None:
    """The model's own name is meant."""
    model = Net()
    state = filled(model)
    error = refusal(model, state | {"module.conv.weight": state["conv.weight"]}, tmp_path)
    assert "1 tensor is unexpected (module.conv.weight)" in error.problem
    error = refusal(model, {"head.module.1.bias": torch.zeros(2)} | state, tmp_path)
    assert "1 tensor is unexpected (head.module.1.bias)" in error.problem
    error = refusal(model, state | under("module.", state), tmp_path)
    assert "2 sets of weights that fit, with no prefix and the prefix 'module.'" in error.problem


def test_a_part_of_the_model_that_shares_all_of_it(tmp_path: Path) -> None:
    """The part alone would be complete, too, but more tensors fit."""
    model = nn.Linear(2, 2, bias=False)
    model.inner = nn.Linear(2, 2, bias=False)
    model.inner.weight = model.weight
    done = load(model, {"weight": torch.ones(2, 2), "inner.weight": torch.ones(2, 2)}, tmp_path)
    assert (done.prefix, done.tensors) == ("", 2)


def test_a_part_of_the_model_that_is_called_like_a_wrapper(tmp_path: Path) -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "net": nn.ModuleDict({"module": nn.Linear(2, 2)})})
    model["net"].register_parameter("weight", nn.Parameter(torch.zeros(1)))
    state = filled(model)
    assert load(model, state, tmp_path).prefix == ""
    assert_equal(model.state_dict(), state)


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
def test_one_name_of_a_shared_parameter_suffices(tmp_path: Path, name: str) -> None:
    """safetensors.torch.save_model writes one of them."""
    model = Tied()
    state = filled(model)
    state["second.weight"] = state["first.weight"]
    done = load(model, {key: value for key, value in state.items() if key != name}, tmp_path)
    assert done.tensors == 3
    assert_equal(model.state_dict(), state)
    load(model, state, tmp_path)


def test_different_values_for_a_shared_parameter(tmp_path: Path) -> None:
    error = refusal(Tied(), filled(Tied()), tmp_path)
    assert "different values for first.weight and second.weight, which are one parameter" in error.problem


@pytest.mark.filterwarnings("ignore")  # torch's of weight_norm and quantisation
def test_what_an_older_version_of_the_model_saved(tmp_path: Path) -> None:
    """The model's hooks rename it, as those of torch's weight_norm do."""
    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)))
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    assert load(model, under("module.", dict(old.state_dict())), tmp_path).prefix == "module."
    x = torch.rand(4, 3)
    assert torch.equal(model(x), old(x))


def test_a_model_that_refuses_the_values(tmp_path: Path) -> None:
    class Refuses(nn.Linear):
        def _load_from_state_dict(self, state_dict: State, *args: object) -> None:
            super()._load_from_state_dict(state_dict, *args)  # type: ignore[no-untyped-call]
            raise ValueError("not\nthese")

    error = refusal(nn.Sequential(Refuses(2, 2)), filled(nn.Sequential(nn.Linear(2, 2))), tmp_path)
    assert "cannot be loaded into Sequential, which raises ValueError (not these)" in error.problem


def quantised(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")  # torch's of sparse and quantised tensors
@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (quantised, "conv.weight as qint8"),
        (Tensor.to_sparse, "conv.weight as sparse_coo of float32"),
        (lambda t: t.to("meta"), "conv.weight as float32 without values"),
        (Tensor.char, "conv.weight as int8"),
        (lambda t: t.to(torch.complex64), "conv.weight"),
    ],
    ids=["quantised", "sparse", "meta", "int8", "complex"],
)
def test_values_that_are_no_plain_numbers(tmp_path: Path, spoil: Callable[[Tensor], Tensor], what: str) -> None:
    model = Net()
    state = filled(model)
    state["conv.weight"] = spoil(state["conv.weight"])
    error = refusal(model, state, tmp_path)
    assert what in error.problem
    assert "before they are quantised or packed" in error.remedy


@pytest.mark.parametrize("saved", [Net(), {"model": Net(), "epoch": 3}], ids=["alone", "checkpoint"])
def test_a_pickled_network_is_refused(tmp_path: Path, saved: object) -> None:
    error = refusal(Net(), saved, tmp_path)
    assert "could run code when loaded" in error.problem
    assert "torch.save(network.state_dict(), FILE)" in error.remedy


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    model = Net()
    load(model, {"state_dict": filled(model), "trap": Trap(tmp_path / "sprung")}, tmp_path)
    refusal(model, filled(model) | {"trap": Trap(tmp_path / "sprung")}, tmp_path)  # type: ignore[operator]
    assert not (tmp_path / "sprung").exists()


@pytest.mark.filterwarnings("ignore")  # torch's of TorchScript
@pytest.mark.parametrize("kind", ["empty", "truncated", "truncated pickle", "folder", "nothing", "TorchScript"])
def test_other_files(tmp_path: Path, kind: str) -> None:
    model, path, state = Net(), tmp_path / "w.pt", filled(Net())
    whole = io.BytesIO()
    torch.save(state, whole)
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(safetensors.torch.save(state)[:-8])
        case "truncated pickle":
            path.write_bytes(whole.getvalue()[:-300])
        case "folder":
            path.mkdir()
        case "TorchScript":
            torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    before = copy.deepcopy(values(model))
    what = {"folder": "is a folder", "nothing": "there is no file", "TorchScript": "is a TorchScript archive"}
    with pytest.raises(ClassifierError, match=what.get(kind, "is not a complete file of weights")):
        load_weights(model, path)
    assert_equal(values(model), before)


def test_a_network_without_tensors_yet(tmp_path: Path) -> None:
    torch.save(filled(Net()), tmp_path / "w.pt")
    with pytest.raises(UsageError, match="has lazy layers"):
        load_weights(nn.Sequential(nn.LazyLinear(2)), tmp_path / "w.pt")
