from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bnlab import health, norm
from bnlab.errors import ClassifierError, UsageError
from bnlab.health.report import Report
from tests.health.checks.networks import sound_network, teacher_batches


def far_network() -> nn.Sequential:
    """A network whose inputs have other statistics than the initial ones."""
    network = sound_network()
    with torch.no_grad():
        for index in (0, 3):
            network[index].weight.mul_(8)
    norm.recalibrate(network, [x for x, _ in teacher_batches(sound_network(), batches=16)])
    return network


def state() -> dict[str, Tensor]:
    return far_network().state_dict()


def parameters() -> dict[str, Tensor]:
    return {name: p.detach() for name, p in far_network().named_parameters()}


def diagnosed(checkpoint: Any = None, network: nn.Module | None = None) -> Report:
    network = far_network() if network is None else network
    return health.diagnose(network, teacher_batches(network, batches=16), checkpoint=checkpoint)


def test_finds_buffers_that_are_not_persistent() -> None:
    network = far_network()
    for key in ("running_mean", "running_var"):
        network[4].register_buffer(key, network[4]._buffers[key], persistent=False)
    found = diagnosed(network=network)["BN021"]
    assert (found.severity, found.layers) == ("error", ("4",))
    assert "persistent=False" in found.cause
    assert found.cost is not None
    assert found.cost.after == 1.0
    with torch.no_grad():  # what a fresh process would have
        images = [x for x, _ in teacher_batches(network, batches=16)]
        labels = [y for _, y in teacher_batches(network, batches=16)]
        network[4].reset_running_stats()
        right = torch.cat([network(x).argmax(1) == y for x, y in zip(images, labels, strict=True)])
    assert found.cost.before == float(right.double().mean())
    assert found.cost.before < 0.9


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "nested", "mapping"])
def test_finds_a_checkpoint_of_parameters_alone(tmp_path: Path, suffix: str) -> None:
    given: Any = parameters()
    file = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(given, file)
    elif suffix in ("pt", "nested"):
        torch.save(given if suffix == "pt" else {"epoch": 3, "state_dict": given}, file)
    found = diagnosed(given if suffix == "mapping" else file)["BN021"]
    assert (found.severity, found.layers) == ("error", ("1", "4"))
    assert found.cause == "the parameters alone were saved"
    assert found.numbers["missing_parameters"] == 0
    assert found.cost is not None
    assert found.cost.gain > 0.1


def test_what_is_lost_is_known_of_a_network_that_was_loaded_from_it() -> None:
    """Its running statistics are the initial ones, so the recalibrated ones say what it could do."""
    batches, network = teacher_batches(far_network(), batches=16), far_network()
    network.load_state_dict(parameters(), strict=False)
    for index in (1, 4):
        network[index].reset_running_stats()
    found = health.diagnose(network, batches, checkpoint=parameters())["BN021"]
    assert found.cost is not None
    assert found.cost.gain > 0.1
    assert "outputs differ" not in found.message


def test_finds_an_adapter_whose_names_are_others() -> None:
    found = diagnosed({"base_model.model.0.lora_A.weight": torch.ones(2, 3)})["BN021"]
    assert found.layers == ("1", "4")
    assert found.numbers["missing_parameters"] == len(parameters())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_finds_a_prefix(prefix: str) -> None:
    found = diagnosed({prefix + key: value for key, value in state().items()})["BN021"]
    assert (found.severity, found.layers) == ("warn", ("1", "4"))
    assert found.numbers["prefix"] == prefix
    assert found.cost is not None  # of load_state_dict(strict=False), which loads nothing
    assert found.cost.gain > 0.1


def test_finds_missing_statistics_behind_a_prefix() -> None:
    given = {f"module.{key}": value for key, value in state().items() if key != "1.running_var"}
    found = diagnosed(given)["BN021"]
    assert (found.severity, found.layers) == ("error", ("1",))


def test_finds_statistics_of_another_time() -> None:
    given = state()
    given["1.running_mean"] = given["1.running_mean"] + 8
    found = diagnosed(given)["BN021"]
    assert (found.severity, found.layers) == ("warn", ("1",))
    assert found.numbers["difference"] > 0.01


def test_is_silent_on_what_loads_completely(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(state(), file)
    for given in (None, state(), file, {"model": state(), "optimizer": {"state": {}}}):
        assert "BN021" not in diagnosed(given)
    half = {key: value.half() if value.is_floating_point() else value for key, value in state().items()}
    assert "BN021" not in diagnosed(half)
    counters = {key: value for key, value in state().items() if "tracked" not in key}
    assert "BN021" not in diagnosed(counters)


def test_is_silent_on_other_weights() -> None:
    other = {key: value + 1 for key, value in state().items()}
    assert "BN021" not in diagnosed(other)
    unlike = {f"layer.{key}": torch.ones(7) for key in ("weight", "running_mean", "running_var")}
    assert "BN021" not in diagnosed(unlike)


def test_is_silent_on_names_that_hooks_translate() -> None:
    """As models do whose names have changed: what counts is that the statistics come back."""
    network = far_network()

    def save(module: Any, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        for key in [*state]:
            state[f"old.{key}"] = state.pop(key)

    def load(module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for key in [*state]:
            state[key.removeprefix("old.")] = state.pop(key)

    network.register_state_dict_post_hook(save)
    network.register_load_state_dict_pre_hook(load)
    assert "BN021" not in diagnosed(network=network)


def test_files_that_cannot_be_read_are_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ClassifierError, match="there is no file"):
        health.diagnose(sound_network(), [], checkpoint=tmp_path / "none.pt")
    with pytest.raises(UsageError, match="holds no tensor"):
        health.diagnose(sound_network(), [], checkpoint={"epoch": 3})


def test_the_model_is_not_changed() -> None:
    network = far_network()
    diagnosed(parameters(), network)
    assert all(torch.equal(value, state()[key]) for key, value in network.state_dict().items())
