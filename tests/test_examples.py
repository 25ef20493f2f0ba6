"""Each example finds the fault that it plants, and what it does about it helps."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
HELPER = "shapes"
CHECKS = {  # the one that each example is about
    "averaged_weights": "BN017",
    "frozen_backbone": "BN004",
    "lost_eps": "BN026",
    "other_camera": "BN111",
    "padded_sequences": "BN025",
    "parameters_alone": "BN021",
    "sam_two_forwards": "BN010",
    "small_momentum": "BN007",
    "swapped_colours": "BN112",
    "tensorflow_momentum": "BN006",
}
SLOW = {"padded_sequences", "sam_two_forwards"}
COSTS_NOTHING = {"sam_two_forwards"}  # and says so


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in sorted(CHECKS)])
def test_an_example_finds_its_fault_and_mends_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)  # as for a script that is run
    result = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert CHECKS[name] in result["found"]
    assert any(CHECKS[name] in line for line in lines), "the finding is printed"
    assert lines[-1].startswith("The cause: ")
    if name in COSTS_NOTHING:
        assert abs(result["after"] - result["before"]) < 0.02
    else:
        assert result["after"] > result["before"] + 0.02
        assert result["after"] > 0.75, "a network that has learnt nothing shows nothing"


def test_the_readme_lists_every_example_with_its_check_and_its_threads() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {HELPER}
    assert names == CHECKS.keys()
    readme = (EXAMPLES / "README.md").read_text("utf-8")
    rows = [line.strip("| ").split(" | ") for line in readme.splitlines() if ".py](" in line and line.startswith("|")]
    assert len(rows) == len(names)
    for _, example, check, threads in rows:
        name = example.split(".py")[0].strip("[")
        id, page = re.fullmatch(r"\[(BN\d+)\]\(\.\./(docs/checks/.+\.md)\)", check).groups()  # type: ignore[union-attr]
        assert id == CHECKS[name]
        assert (EXAMPLES.parent / page).read_text("utf-8").startswith(f"# {id} ")
        words = "".join((EXAMPLES / f"{name}.py").read_text("utf-8").split('"""')[1].split())
        cited = re.findall(r"\[([\w./-]+)#(\d+)\]\(https://github\.com/([\w./-]+)/(?:issues|pull)/(\d+)\)", threads)
        assert len(cited) == threads.count("https://")
        for repository, number, linked, linked_number in cited:
            assert (repository, number) == (linked, linked_number)
            assert f"#{number}" in words and repository in words


def test_every_example_says_the_story_the_cause_and_what_to_do() -> None:
    for name in CHECKS:
        page = (EXAMPLES / f"{name}.py").read_text("utf-8").split('"""')[1]
        assert page.index("\nThe story: ") < page.index("\nThe cause: ") < page.index("\nWhat to do: "), name
