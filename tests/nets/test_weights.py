import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from bnlab.errors import ClassifierError, OutOfMemoryError
from bnlab.nets.weights import read_weights

WEIGHTS = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.ones(2)}


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))


def refusal(path: Path) -> str:
    with pytest.raises(ClassifierError) as error:
        read_weights(path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrappers", [(), ("state_dict",), ("model", "state_dict")])
def test_weights_are_found_in_what_torch_saved(tmp_path: Path, zipped: bool, wrappers: tuple[str, ...]) -> None:
    saved: object = WEIGHTS
    for wrapper in reversed(wrappers):
        saved = {wrapper: saved, "epoch": 3}
    torch.save(saved, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    found, _ = read_weights(tmp_path / "w.pt")
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


class Setting:
    def __init__(self) -> None:
        self.items: list[int] = [1]


def test_other_objects_of_a_checkpoint_are_not_read(tmp_path: Path) -> None:
    objects = {
        "setting": Setting(),
        "trap": Trap(tmp_path / "sprung"),
        "path": tmp_path,
        "kind": {Setting: [Setting()]},
    }
    torch.save({"hyper_parameters": objects, "state_dict": WEIGHTS, "optimizer": {"w": WEIGHTS}}, tmp_path / "w.pt")
    found, _ = read_weights(tmp_path / "w.pt")
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)
    assert not (tmp_path / "sprung").exists()


def test_sets_of_tensors_have_their_names_before_those_of_their_tensors(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "state_dict_ema": {"fc.weight": torch.zeros(2, 3)}}, tmp_path / "w.pt")
    found, _ = read_weights(tmp_path / "w.pt")
    assert list(found) == ["state_dict.fc.weight", "state_dict.fc.bias", "state_dict_ema.fc.weight"]
    assert torch.equal(found["state_dict.fc.bias"], torch.ones(2))


def test_a_full_memory_is_no_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    torch.save(WEIGHTS, tmp_path / "w.pt")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(OutOfMemoryError, match=r"out of memory while .*w\.pt was read: close"):
        read_weights(tmp_path / "w.pt")


def test_safetensors_are_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(WEIGHTS, tmp_path / "w.safetensors", {"format": "pt"})
    found, metadata = read_weights(tmp_path / "w.safetensors")
    assert torch.equal(found["fc.weight"], WEIGHTS["fc.weight"])
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_never_run(tmp_path: Path, zipped: bool) -> None:
    torch.save(WEIGHTS | {"trap": Trap(tmp_path / "sprung")}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert "could run code when loaded: save the state_dict()" in refusal(tmp_path / "w.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_truncated_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w"
    if kind == "safetensors":
        path.write_bytes(safetensors.torch.save(WEIGHTS))
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    for length in (0, 5, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert "is not a complete file of weights" in refusal(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    assert "there is no file" in refusal(path)
    assert "is a folder" in refusal(tmp_path)
    torch.save([torch.zeros(2)], path)
    assert "holds a list" in refusal(path)
    torch.save({}, path)
    assert "holds nothing" in refusal(path)
    torch.save(WEIGHTS | {"epoch": 3}, path)
    assert "has 'epoch' (int) among its tensors" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/constants.pkl", b"")
    assert "is a TorchScript archive" in refusal(path)
