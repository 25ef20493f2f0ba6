import shutil
from pathlib import Path

import pytest
from PIL import Image
from tests.conftest import write_photos

from bnlab.data.dataset import Dataset, open_evaluation_data, open_recorded_data, open_training_data
from bnlab.data.split import split_folder
from bnlab.data.split_csv import read_split_csv, write_split_csv
from bnlab.data.write_split import write_split
from bnlab.errors import DataError
from bnlab.progress import NullProgress


def opened(data: Path, progress: NullProgress | None = None) -> Dataset:
    return open_training_data(data, val=0.3, seed=0, progress=progress or NullProgress())


def refusal(data: Path) -> str:
    with pytest.raises(DataError) as error:
        opened(data)
    return str(error.value)


def shape(dataset: Dataset) -> set[tuple[str, str, str]]:
    return {(Path(p.path).name, p.label, p.split) for p in dataset.photos}


def test_all_three_kinds_give_the_same(photos: Path, tmp_path: Path) -> None:
    split = split_folder(photos, val=0.3, test=0, seed=0, progress=NullProgress())
    write_split(split, tmp_path / "data", "link", NullProgress())
    plain, folder, listed = opened(photos), opened(tmp_path / "data"), opened(tmp_path / "data" / "split.csv")
    assert shape(plain) == shape(folder) == shape(listed)
    assert plain.classes == folder.classes == listed.classes == ("disc", "ring", "stripes")
    assert {p.sha256 for p in plain.photos} == {p.sha256 for p in folder.photos}


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_the_names_of_val(data: Path, name: str) -> None:
    (data / "val").rename(data / name)
    assert len(opened(data).in_split("val")) == 12


def test_a_photo_listed_is_not_read_again(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split(
        split_folder(photos, val=0.3, test=0, seed=0, progress=NullProgress()),
        tmp_path / "data",
        "copy",
        NullProgress(),
    )
    shutil.copy(photos / "disc" / "disc000.png", tmp_path / "data" / "train" / "disc" / "new.png")
    read: list[str] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: (read.append(self.name), real(self, *a, **k))[1])
    dataset = opened(tmp_path / "data")
    assert read.count("new.png") == 1
    assert set(read) == {"split.csv", "new.png"}
    assert len(dataset.photos) == 37


def test_without_a_val_side_part_of_train_is_held_out(tmp_path: Path) -> None:
    write_photos(tmp_path / "data" / "train", each=12)
    dataset = opened(tmp_path / "data")
    assert 3 < len(dataset.in_split("val")) < 20
    write_photos(tmp_path / "data" / "test", each=2, first=50)
    assert {p.path for p in opened(tmp_path / "data").in_split("val")} == {p.path for p in dataset.in_split("val")}
    assert len(opened(tmp_path / "data").in_split("test")) == 6


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", each=12)
    (tmp_path / "photos" / "ring").rename(tmp_path / "photos" / "train")
    assert opened(tmp_path / "photos").classes == ("disc", "stripes", "train")


def test_a_class_missing_in_val_shifts_no_label(data: Path) -> None:
    shutil.rmtree(data / "val" / "disc")
    dataset = opened(data)
    assert dataset.classes == ("disc", "ring", "stripes")
    assert {p.label for p in dataset.in_split("val")} == {"ring", "stripes"}


def test_a_class_unknown_to_train_is_named(data: Path) -> None:
    (data / "val" / "disc").rename(data / "val" / "disk")
    assert refusal(data) == (
        f"val of {data} has the class 'disk', which train has not: add photos of it to train or take it out of val"
    )


def test_what_cannot_be_trained_on(data: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"there is no folder {tmp_path / 'none'}: check the path"
    (tmp_path / "empty").mkdir()
    assert "has neither sub-folders nor photos" in refusal(tmp_path / "empty")
    (data / "train" / "void").mkdir()
    assert "class 'void' has no photos in " in refusal(data)
    (data / "train" / "void").rmdir()
    shutil.copytree(data / "val", data / "valid")
    assert "has two val folders: keep one of val, valid and validation" in refusal(data)
    shutil.rmtree(data / "valid")
    for label in ("disc", "ring"):
        shutil.rmtree(data / "train" / label)
    assert "has one class only, 'stripes'" in refusal(data)


def test_broken_photos_are_refused(data: Path) -> None:
    (data / "train" / "disc" / "x.jpg").write_text("text")
    dataset = opened(data)
    assert [Path(r.path).name for r in dataset.refused] == ["x.jpg"]
    assert len(dataset.photos) == 36


def test_conflicts_are_told(photos: Path) -> None:
    shutil.copy(photos / "ring" / "ring000.png", photos / "disc" / "x.png")
    progress = NullProgress()
    opened(photos, progress)
    assert progress.warnings[0].startswith("1 group of duplicates in more than one class")


def test_recorded_data_must_still_be_there(data: Path, tmp_path: Path) -> None:
    write_split_csv(tmp_path / "split.csv", opened(data).photos)
    assert shape(open_recorded_data(tmp_path / "split.csv")) == shape(opened(data))
    gone = read_split_csv(tmp_path / "split.csv")[3].path
    Path(gone).unlink()
    with pytest.raises(DataError, match=r"is gone, and the run was trained on it: put it back to resume"):
        open_recorded_data(tmp_path / "split.csv")


def test_evaluation_reads_the_least_seen_side(data: Path, photos: Path) -> None:
    assert open_evaluation_data(data, None)[0] == "val"
    assert len(open_evaluation_data(data, "train")[1]) == 24
    assert len(open_evaluation_data(data, "all")[1]) == 36
    write_photos(data / "test", each=2, first=50)
    side, listed = open_evaluation_data(data, None)
    assert (side, len(listed)) == ("test", 6)
    assert open_evaluation_data(photos, None)[0] == "all"
    with pytest.raises(DataError, match="has no test side: say --split all"):
        open_evaluation_data(photos, "test")


def test_held_out_photos_keep_their_duplicates(tmp_path: Path) -> None:
    """Without a val side, as `bnlab split` does it: near duplicates on one side."""
    write_photos(tmp_path / "data" / "train", each=12)
    for path in sorted((tmp_path / "data" / "train" / "disc").iterdir()):
        with Image.open(path) as image:
            image.resize((80, 80)).save(path.with_suffix(".webp"), quality=95)
    dataset = opened(tmp_path / "data")
    side_of = {Path(p.path).name: p.split for p in dataset.photos}
    assert {side_of[f"disc{i:03}.png"] for i in range(12)} == {"train", "val"}
    assert all(side_of[f"disc{i:03}.png"] == side_of[f"disc{i:03}.webp"] for i in range(12))
    assert not dataset.own_val


def test_a_list_may_name_what_is_not_there(data: Path) -> None:
    write_split_csv(data / "split.csv", opened(data).photos)
    gone = read_split_csv(data / "split.csv")[0].path
    Path(gone).unlink()
    dataset = opened(data / "split.csv")
    assert [(r.path, r.reason) for r in dataset.refused] == [(gone, "there is no such file")]
    bare = "path,class,split\n" + "".join(f"{p.path},{p.label},{p.split}\n" for p in dataset.photos)
    (data / "bare.csv").write_text(bare)
    Path(dataset.photos[0].path).write_text("text")
    dataset = opened(data / "bare.csv")
    assert [r.reason for r in dataset.refused] == ["it is not an image that Pillow can read"]
    assert all(p.sha256 for p in dataset.photos)


def test_a_folder_that_holds_only_a_list_is_that_list(photos: Path, tmp_path: Path) -> None:
    split = split_folder(photos, val=0.3, test=0, seed=0, progress=NullProgress())
    write_split(split, tmp_path / "lists", "list", NullProgress())
    assert shape(opened(tmp_path / "lists")) == shape(opened(photos))
    assert open_evaluation_data(tmp_path / "lists", None)[0] == "val"


def test_folders_beside_the_sides_are_told(data: Path) -> None:
    (data / "unlabelled").mkdir()
    progress = NullProgress()
    opened(data, progress)
    assert progress.warnings == [f"{data} has folders beside its sides, which are left out: unlabelled"]


def test_a_class_called_train_with_sub_folders_is_a_class(photos: Path) -> None:
    (photos / "train" / "2020").mkdir(parents=True)
    for path in (photos / "ring").iterdir():
        path.rename(photos / "train" / "2020" / path.name)
    (photos / "ring").rmdir()
    assert opened(photos).classes == ("disc", "stripes", "train")


def test_a_photo_on_two_sides_is_told_and_one_listed_twice_refused(data: Path) -> None:
    shutil.copy(data / "train" / "disc" / "disc000.png", data / "val" / "disc" / "x.png")
    progress = NullProgress()
    dataset = opened(data, progress)
    assert progress.warnings == ["val and test share 1 photo with train, to the byte: accuracy will flatter"]
    write_split_csv(data / "twice.csv", [*dataset.photos, dataset.photos[0]])
    assert refusal(data / "twice.csv") == (
        f"{data}/twice.csv lists {dataset.photos[0].path} more than once: a photo has one class and one side"
    )


def test_odd_things_on_a_side_are_told(data: Path) -> None:
    shutil.copy(data / "train" / "disc" / "disc000.png", data / "train" / "loose.png")
    progress = NullProgress()
    opened(data, progress)
    assert progress.warnings == [f"left out 1 photo beside the classes in {data}/train, in none of them"]
