import shutil
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Outcome

Command = Callable[..., Outcome]
VERBS = ("split", "train", "evaluate", "predict", "demo", "net", "import")


def test_broken_photos_are_named_and_strict_refuses_them(bnlab: Command, photos: Path) -> None:
    for number in range(7):
        (photos / "disc" / f"bad{number}.jpg").write_text("text")
    done = bnlab("split", photos, "--into", "data", "--val", 0.3)
    assert done.status == 0
    assert f"warning: left out {photos}/disc/bad0.jpg: it is not an image that Pillow can read" in done.err
    assert "warning: and 2 more photos that cannot be used" in done.err
    assert "7 photos cannot be used and are left out" in done.out
    done = bnlab("split", photos, "--into", "other", "--strict")
    assert done.status == 2
    assert done.complaint.startswith(f"7 photos cannot be used (the first: {photos}/disc/bad0.jpg, it is not an image")
    assert not Path("other").exists()


def test_what_is_odd_in_a_folder_is_told(bnlab: Command, photos: Path) -> None:
    shutil.copy(photos / "disc/disc000.png", photos / "stray.png")
    shutil.copytree(photos / "disc", photos / "ring" / "deep")
    shutil.copy(photos / "disc/disc000.png", photos / "disc" / "noname")
    (photos / "disc" / "notes.txt").touch()
    done = bnlab("split", photos, "--into", "data", "--val", 0.04)
    assert f"warning: left out 1 photo in {photos} that belong" in done.err
    assert "warning: class 'ring' has sub-folders (deep)" in done.err
    assert "left out 2 other files: 1 with no suffix, 1 with .txt" in done.err
    assert "warning: val has no photo of class '" in done.err
