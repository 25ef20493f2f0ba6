"""`bnlab split`: its document, its warnings, and what it imports."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import Outcome, write_photos

Command = Callable[..., Outcome]


def test_the_document(bnlab: Command, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", each=6)
    shutil.copy(photos / "ring/ring000.png", photos / "disc/copy.png")
    (photos / "disc/bad.jpg").write_text("text")
    document = json.loads(bnlab("split", "photos", "--into", "new", "--val", 0.3, "--json").out)
    assert list(document) == ["into", "written", "counts", "refused", "duplicates", "label_conflicts"]
    assert (document["into"], document["written"]) == ("new", True)
    assert sum(sum(count.values()) for count in document["counts"].values()) == 19
    assert document["refused"] == [{"path": "photos/disc/bad.jpg", "reason": "it is not an image that Pillow can read"}]
    (conflict,) = document["label_conflicts"]
    assert {photo["class"] for photo in conflict["photos"]} == {"ring", "disc"}
    assert conflict["exact"] is True


def test_a_split_that_is_there_is_not_written_again(bnlab: Command, photos: Path) -> None:
    words = ("split", "photos", "--into", "data", "--val", 0.3)
    done = bnlab(*words)
    assert done.out.splitlines()[0].split() == ["class", "train", "val", "all"]
    assert done.out.splitlines()[-1] == "data: written. Next: bnlab train data"
    again = bnlab(*words).out.splitlines()[-1]
    assert "nothing to do" in again
    assert again.endswith("Next: bnlab train data")


def test_ways_of_writing_a_split(bnlab: Command, photos: Path, tmp_path: Path) -> None:
    photo = photos / "ring" / "ring000.png"
    for way, files, links in (("--link", 39, 2), ("--copy", 39, 2), ("--list", 1, 2)):
        done = bnlab("split", "photos", "--into", way[2:], "--val", 0.3, way)
        assert done.status == 0
        written = [path for path in (tmp_path / way[2:]).rglob("*") if path.is_file()]
        assert len([path for path in written if path.suffix == ".png"]) == (36 if files > 1 else 0)
        assert photo.stat().st_nlink == links
    assert "list/split.csv" in done.out.splitlines()[-1]


def test_broken_photos_are_named_and_strict_refuses_them(bnlab: Command, photos: Path) -> None:
    for number in range(7):
        (photos / "disc" / f"bad{number}.jpg").write_text("text")
    done = bnlab("split", photos, "--into", "data", "--val", 0.3)
    assert done.status == 0
    assert f"warning: left out {photos}/disc/bad0.jpg: it is not an image" in done.err
    assert "warning: and 2 more photos that cannot be used" in done.err
    assert "7 photos cannot be used and are left out" in done.out
    done = bnlab("split", photos, "--into", "other", "--strict")
    assert done.status == 2
    assert done.complaint.startswith(f"7 photos cannot be used (the first: {photos}/disc/bad0.jpg, it is not an image")
    assert not Path("other").exists()


def test_folders_that_cannot_be_read_are_named_and_strict_refuses_them(
    bnlab: Command, photos: Path, locked: str
) -> None:
    (photos / "disc" / locked).mkdir()
    done = bnlab("split", photos, "--into", "data", "--val", 0.3)
    assert done.status == 0
    assert f"warning: left out {photos}/disc/{locked}: it cannot be read (Permission denied)" in done.err
    assert "1 folder cannot be used and is left out" in done.out
    assert f"refused,,{photos}/disc/{locked},,it cannot be read" in Path("data/findings.csv").read_text()
    done = bnlab("split", photos, "--into", "other", "--strict")
    assert done.complaint.startswith(f"1 folder cannot be used (the first: {photos}/disc/{locked}, it cannot be read")
    assert (done.status, Path("other").exists()) == (2, False)


def test_small_classes_are_told_which_split_they_lack(bnlab: Command, photos: Path) -> None:
    for photo in sorted((photos / "disc").iterdir())[2:]:
        photo.unlink()
    done = bnlab("split", photos, "--into", "data", "--val", 0.3, "--test", 0.3)
    assert "warning: test has no photo of class 'disc' (1 in train and 1 in val), so" in done.err
    assert done.err.count("warning") == 1


def test_odd_files_in_a_folder_are_reported(bnlab: Command, photos: Path) -> None:
    shutil.copy(photos / "disc/disc000.png", photos / "stray.png")
    shutil.copytree(photos / "disc", photos / "ring" / "deep")
    shutil.copy(photos / "disc/disc000.png", photos / "disc" / "noname")
    (photos / "disc" / "notes.txt").touch()
    done = bnlab("split", photos, "--into", "data", "--val", 0.04)
    for what in (str(photos), "'ring' has sub-folders (deep)", "1 with no suffix", "1 with .txt"):
        assert any(what in line for line in done.err.splitlines()), what


def test_a_folder_that_cannot_be_made(bnlab: Command, photos: Path) -> None:
    done = bnlab("split", photos, "--into", "/proc/x", "--val", 0.3)
    assert done.complaint.startswith("/proc/x cannot be written (No such file or directory)")
    assert done.status == 2


def test_colons_are_not_emoji(bnlab: Command, photos: Path) -> None:
    done = bnlab("split", photos, "--into", "o:100:k", "--val", 0.3)
    assert done.out.splitlines()[-1] == "o:100:k: written. Next: bnlab train o:100:k"


def test_it_imports_neither_torch_nor_scipy(photos: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from bnlab.__main__ import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'scipy', 'sklearn', 'matplotlib', 'jinja2'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    words = [sys.executable, "-c", script, "split", str(photos), "--into", str(tmp_path / "data"), "--val", "0.3"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Next: bnlab train" in done.stdout


def test_the_range_and_the_limit_of_pixels(bnlab: Command, photos: Path) -> None:
    for path in photos.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path).convert("L")).astype(np.uint16)).save(path)
    assert "train with pixel_range=255" in bnlab("split", "photos", "--into", "a").err.replace("\n", " ")
    for given in ("255", "0,255"):
        done = bnlab("split", "photos", "--into", f"b{len(given)}", "--pixel-range", given)
        assert (done.status, "pixel_range" in done.err) == (0, False)
    wrong = bnlab("split", "photos", "--into", "c", "--pixel-range", "9,1")
    assert (wrong.status, "pixel_range is '9,1'" in wrong.complaint) == (2, True)
    refused = bnlab("split", "photos", "--into", "d", "--max-megapixels", 0.001)
    assert refused.status == 2
    assert "max_megapixels" in refused.complaint
