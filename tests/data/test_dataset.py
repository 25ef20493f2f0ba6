import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnlab.data.dataset import Dataset, open_evaluation_data, open_recorded_data, open_training_data
from bnlab.data.photo_file import PhotoReader
from bnlab.data.split import LinkMode, split_folder, write_split
from bnlab.data.split_csv import read_split_csv, write_split_csv
from bnlab.errors import DataError
from bnlab.files import file_sha256
from bnlab.progress import NullProgress
from tests.conftest import picture, write_photos


def opened(data: Path, progress: NullProgress | None = None) -> Dataset:
    return open_training_data(data, val=0.3, seed=0, progress=progress or NullProgress())


def refusal(data: Path) -> str:
    with pytest.raises(DataError) as error:
        opened(data)
    return str(error.value)


def shape(dataset: Dataset) -> set[tuple[str, str, str]]:
    return {(Path(p.path).name, p.label, p.split) for p in dataset.photos}


def test_a_folder_a_split_folder_and_a_list_give_the_same(photos: Path, tmp_path: Path) -> None:
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


def test_a_photo_with_a_listed_sha256_is_not_read(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_without_val_a_part_of_train_is_held_out(tmp_path: Path) -> None:
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


def test_a_class_that_val_lacks_shifts_no_label(data: Path) -> None:
    shutil.rmtree(data / "val" / "disc")
    dataset = opened(data)
    assert dataset.classes == ("disc", "ring", "stripes")
    assert {p.label for p in dataset.in_split("val")} == {"ring", "stripes"}


def test_a_class_unknown_to_train_is_named(data: Path) -> None:
    (data / "val" / "disc").rename(data / "val" / "disk")
    assert f"val of {data} has the class 'disk', which train does not have" in refusal(data)


def test_data_that_cannot_be_trained_on_are_refused(data: Path, tmp_path: Path) -> None:
    assert f"no folder {tmp_path / 'none'}" in refusal(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "has neither sub-folders nor photos" in refusal(tmp_path / "empty")
    shutil.copytree(data / "val", data / "valid")
    assert "has two val folders" in refusal(data)
    shutil.rmtree(data / "valid")
    for label in ("disc", "ring"):
        shutil.rmtree(data / "train" / label)
    (data / "train" / "void").mkdir()
    assert f"train of {data} has only one class, 'stripes'; left out: void (no photos): " in refusal(data)


def test_folders_that_cannot_be_read_are_refused(data: Path, photos: Path, locked: str) -> None:
    for folder in (photos / "disc", data / "train" / "disc", data / "val" / "ring"):
        (folder / locked).mkdir()
    (data / "test").symlink_to(data / "unplugged")
    (data / "train" / "gone").symlink_to(data / "unplugged")
    assert [each.path for each in opened(photos).refused] == [str(photos / "disc" / locked)]
    found = {os.path.relpath(each.path, data) for each in opened(data).refused}
    assert found == {"test", "train/gone", f"train/disc/{locked}", f"val/ring/{locked}"}


def test_empty_folders_and_those_of_the_system_are_left_out_with_a_warning(data: Path) -> None:
    for name in ("train/new", "val/new2"):
        (data / name).mkdir()
    for name in ("__MACOSX/train/disc", "train/@eaDir", "train/disc/@eaDir"):
        (data / name).mkdir(parents=True)
        (data / name / "small.jpg").touch()
    progress = NullProgress()
    dataset = opened(data, progress)
    assert (dataset.classes, len(dataset.photos)) == (("disc", "ring", "stripes"), 36)
    assert progress.warnings == [
        f"left out 1 folder without photos: {data}/train/new",
        f"left out 2 folders of the system: {data}/train/@eaDir, {data}/train/disc/@eaDir",
        f"left out 1 folder without photos: {data}/val/new2",
        f"left out folders of {data} that are not train, val or test: __MACOSX",
    ]


def test_broken_photos_are_refused(data: Path) -> None:
    (data / "train" / "disc" / "x.jpg").write_text("text")
    dataset = opened(data)
    assert [Path(r.path).name for r in dataset.refused] == ["x.jpg"]
    assert len(dataset.photos) == 36


def test_duplicates_in_two_classes_are_reported(photos: Path) -> None:
    shutil.copy(photos / "ring" / "ring000.png", photos / "disc" / "x.png")
    progress = NullProgress()
    opened(photos, progress)
    assert progress.warnings[0].startswith("1 group of duplicates in more than one class")


def test_recorded_data_must_still_be_there(data: Path, tmp_path: Path) -> None:
    write_split_csv(tmp_path / "split.csv", opened(data).photos)
    assert shape(open_recorded_data(tmp_path / "split.csv")) == shape(opened(data))
    gone = read_split_csv(tmp_path / "split.csv")[3].path
    Path(gone).unlink()
    with pytest.raises(DataError, match=f"1 photo cannot be read .*{Path(gone).name}.*: restore"):
        open_recorded_data(tmp_path / "split.csv")


def test_evaluation_uses_test_before_val(data: Path, photos: Path) -> None:
    assert open_evaluation_data(data, None)[0] == "val"
    assert len(open_evaluation_data(data, "train")[1]) == 24
    assert len(open_evaluation_data(data, "all")[1]) == 36
    write_photos(data / "test", each=2, first=50)
    split, listed = open_evaluation_data(data, None)
    assert (split, len(listed)) == ("test", 6)
    assert open_evaluation_data(photos, None)[0] == "all"
    with pytest.raises(DataError, match="has no test split: use split all"):
        open_evaluation_data(photos, "test")


def test_held_out_photos_keep_their_duplicates(tmp_path: Path) -> None:
    """Near duplicates are assigned to the same split, as in `bnlab split`."""
    write_photos(tmp_path / "data" / "train", each=12)
    for path in sorted((tmp_path / "data" / "train" / "disc").iterdir()):
        with Image.open(path) as image:
            image.resize((80, 80)).save(path.with_suffix(".webp"), quality=95)
    dataset = opened(tmp_path / "data")
    split_of = {Path(p.path).name: p.split for p in dataset.photos}
    assert {split_of[f"disc{i:03}.png"] for i in range(12)} == {"train", "val"}
    assert all(split_of[f"disc{i:03}.png"] == split_of[f"disc{i:03}.webp"] for i in range(12))
    assert not dataset.own_val


def test_a_list_may_name_missing_and_broken_photos(data: Path) -> None:
    write_split_csv(data / "split.csv", opened(data).photos)
    gone = read_split_csv(data / "split.csv")[0].path
    Path(gone).unlink()
    dataset = opened(data / "split.csv")
    assert [(r.path, r.reason) for r in dataset.refused] == [(gone, "there is no such file")]
    bare = "path,class,split\n" + "".join(f"{p.path},{p.label},{p.split}\n" for p in dataset.photos)
    (data / "bare.csv").write_text(bare)
    broken = dataset.photos[0].path
    Path(broken).write_text("text")
    dataset = opened(data / "bare.csv")
    assert [Path(r.path).name for r in dataset.refused] == [Path(broken).name]
    assert all(p.sha256 for p in dataset.photos)


def test_a_folder_that_holds_only_a_list_is_that_list(photos: Path, tmp_path: Path) -> None:
    split = split_folder(photos, val=0.3, test=0, seed=0, progress=NullProgress())
    write_split(split, tmp_path / "lists", "list", NullProgress())
    assert shape(opened(tmp_path / "lists")) == shape(opened(photos))
    assert open_evaluation_data(tmp_path / "lists", None)[0] == "val"


def test_other_folders_of_a_split_folder_are_reported(data: Path) -> None:
    (data / "unlabelled").mkdir()
    progress = NullProgress()
    opened(data, progress)
    (warning,) = progress.warnings
    assert str(data) in warning
    assert "unlabelled" in warning


def test_a_class_called_train_with_sub_folders_is_a_class(photos: Path) -> None:
    (photos / "train" / "2020").mkdir(parents=True)
    for path in (photos / "ring").iterdir():
        path.rename(photos / "train" / "2020" / path.name)
    (photos / "ring").rmdir()
    assert opened(photos).classes == ("disc", "stripes", "train")


def test_a_photo_in_two_splits_is_reported_and_one_listed_twice_refused(data: Path) -> None:
    shutil.copy(data / "train" / "disc" / "disc000.png", data / "val" / "disc" / "x.png")
    progress = NullProgress()
    dataset = opened(data, progress)
    (warning,) = progress.warnings
    assert "1 photo of val and test" in warning
    write_split_csv(data / "twice.csv", [*dataset.photos, dataset.photos[0]])
    assert f"{data}/twice.csv lists {dataset.photos[0].path} more than once" in refusal(data / "twice.csv")


def test_ignored_files_of_a_split_are_reported(data: Path) -> None:
    shutil.copy(data / "train" / "disc" / "disc000.png", data / "train" / "loose.png")
    progress = NullProgress()
    opened(data, progress)
    (warning,) = progress.warnings
    assert f"1 photo of {data}/train" in warning


def write_dark(folder: Path) -> None:
    """A split folder of pictures of 12 bits that declare no range."""
    for split, first in (("train", 0), ("val", 9)):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for number in range(first, first + 2):
                values = np.random.default_rng((ord(label), number)).integers(0, 4000, (8, 8), dtype=np.uint16)
                Image.fromarray(values).save(folder / split / label / f"{number}.png")


def test_dark_pictures_are_known_whether_they_are_listed_or_not(tmp_path: Path) -> None:
    write_dark(tmp_path / "data")
    first = opened(tmp_path / "data")
    assert len(first.reader.found.deep) == 8
    write_split_csv(tmp_path / "data" / "split.csv", first.photos, absolute=True)
    again = opened(tmp_path / "data" / "split.csv")
    assert len(again.reader.found.deep) == 8
    assert again.reader.found.largest == first.reader.found.largest


def test_listed_floating_point_pictures_without_a_range_are_refused_before_training(tmp_path: Path) -> None:
    write_dark(tmp_path / "data")
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(tmp_path / "data" / "train" / "a" / "0.tif")
    reader = PhotoReader((0, 4095))
    listed = open_training_data(tmp_path / "data", val=0.3, seed=0, progress=NullProgress(), reader=reader)
    assert len(listed.photos) == 9
    write_split_csv(tmp_path / "data" / "split.csv", listed.photos, absolute=True)
    assert "set pixel_range" in refusal(tmp_path / "data" / "split.csv")


def replaced(path: str | Path, by: str = "ring") -> str:
    """Put another picture in the place of a photo."""
    Path(path).unlink()  # it may be a hard link
    picture(by, 500 + len(str(path))).save(path)
    return str(path)


def split_of(photos: Path, into: Path, how: LinkMode = "copy") -> Path:
    write_split(split_folder(photos, val=0.3, test=0.2, seed=0, progress=NullProgress()), into, how, NullProgress())
    return into


@pytest.mark.parametrize("list_alone", [False, True])
def test_photos_replaced_since_the_split_are_taken_as_they_are(photos: Path, tmp_path: Path, list_alone: bool) -> None:
    """With their true SHA-256, so that the run's list is right, and with a warning."""
    data = split_of(photos, tmp_path / "data")
    other = replaced(next(iter((data / "train" / "disc").iterdir())))
    dataset = opened(data / "split.csv" if list_alone else data, progress := NullProgress())
    (warning,) = progress.warnings
    assert f"1 photo changed since the split.csv of {data}" in warning
    assert other in warning
    assert {p.sha256 for p in dataset.photos if p.path == other} == {file_sha256(other)}
    copied = next(iter(dataset.in_split("val"))).path
    shutil.copy(copied, other)
    opened(data, progress := NullProgress())
    assert any("1 photo of val and test also in train" in warning for warning in progress.warnings)
    Path(other).write_text("text")
    assert [Path(refusal.path).name for refusal in opened(data).refused] == [Path(other).name]


def test_a_list_without_sizes_is_verified_by_content(photos: Path, tmp_path: Path) -> None:
    """As a bnlab before this one wrote it."""
    data = split_of(photos, tmp_path / "data")
    rows = [line.rsplit(",", 2)[0] for line in (data / "split.csv").read_text().splitlines()]
    (data / "split.csv").write_text("\n".join(rows) + "\n")
    opened(data, progress := NullProgress())
    assert progress.warnings == []
    other = replaced(next(iter((data / "val" / "ring").iterdir())), "disc")
    opened(data, progress := NullProgress())
    assert other in progress.warnings[0]
    with pytest.raises(DataError, match=r"1 photo has other content .*: restore them"):
        open_recorded_data(data / "split.csv")


def test_recorded_photos_are_verified(data: Path, tmp_path: Path) -> None:
    write_split_csv(tmp_path / "split.csv", opened(data).photos)
    paths = list(read_split_csv(tmp_path / "split.csv").in_split("train").paths)
    for path in paths:
        os.utime(path, ns=(1, 1))  # the same content
    assert shape(open_recorded_data(tmp_path / "split.csv")) == shape(opened(data))
    for path in paths[:7]:
        replaced(path)
    with pytest.raises(DataError, match=rf"7 photos have other content \({paths[0]}, .*{paths[4]} and 2 more\)"):
        open_recorded_data(tmp_path / "split.csv")
    assert open_recorded_data(tmp_path / "split.csv", splits=("val",)).classes == ("disc", "ring", "stripes")


def test_recorded_photos_are_found_in_another_folder(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "runs"
    folder.mkdir(parents=True)
    write_split_csv(folder / "split.csv", opened(data).photos)
    opened(data).place.record(folder)
    here = shape(open_recorded_data(folder / "split.csv"))
    elsewhere = data.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"in {data} 36 photos cannot be read"):
        open_recorded_data(folder / "split.csv")
    with pytest.raises(DataError, match="there is no folder"):
        open_recorded_data(folder / "split.csv", data=data)
    found = open_recorded_data(folder / "split.csv", data=elsewhere)
    assert shape(found) == here
    assert all(path.startswith(f"{elsewhere}/") for path in found.photos.paths)
    found.place.record(folder)
    assert list(open_recorded_data(folder / "split.csv").photos.paths) == list(found.photos.paths)
    write_split_csv(elsewhere / "split.csv", opened(elsewhere).photos, absolute=True)
    assert shape(open_recorded_data(folder / "split.csv", data=elsewhere / "split.csv")) == here

    moved = (tmp_path / "a").rename(tmp_path / "b") / "runs"
    elsewhere.rename(tmp_path / "gone")
    with pytest.raises(DataError, match=rf"in {data} 36 photos .*, and in {elsewhere} 36 photos"):
        open_recorded_data(moved / "split.csv")


def test_a_replaced_photo_of_a_moved_project_is_named_where_it_is_now(data: Path, tmp_path: Path) -> None:
    """The old place, where all photos are missing, would send the reader to the wrong folder."""
    (runs := tmp_path / "a" / "runs").mkdir(parents=True)
    inside = data.rename(tmp_path / "a" / "data")
    write_split_csv(runs / "split.csv", opened(inside).photos)
    opened(inside).place.record(runs)
    moved = (tmp_path / "a").rename(tmp_path / "b")
    photo = replaced(open_recorded_data(moved / "runs" / "split.csv").photos.paths[0])
    with pytest.raises(DataError) as error:
        open_recorded_data(moved / "runs" / "split.csv")
    assert f"in {moved}/data 1 photo has other content ({photo})" in error.value.problem
    assert str(inside) not in str(error.value)


def test_a_run_as_data_is_found_where_it_was_moved(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "a" / "runs" / "x"
    run.mkdir(parents=True)
    inside = data.rename(tmp_path / "a" / "data")
    (run / "recipe.yaml").touch()
    write_split_csv(run / "split.csv", opened(inside).photos)
    opened(inside).place.record(run)
    moved = (tmp_path / "a").rename(tmp_path / "b") / "runs" / "x"
    assert len(opened(moved).photos) == 36
    split, photos = open_evaluation_data(moved, None, progress=(progress := NullProgress()))
    assert (split, len(photos), progress.warnings) == ("val", 12, [])
    assert all(path.startswith(str(tmp_path / "b")) for path in photos.paths)
    other = replaced(photos.paths[0])
    open_evaluation_data(moved, None, progress=progress)
    assert "1 photo changed since the split.csv of" in progress.warnings[0]
    assert other in progress.warnings[0]
    (tmp_path / "b" / "data").rename(tmp_path / "c")
    for opening in (opened, lambda path: open_evaluation_data(path, None)):
        with pytest.raises(DataError, match=rf"neither in {inside} nor in {tmp_path}/b/data"):
            opening(moved)
