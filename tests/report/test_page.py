import html.parser
import re
from dataclasses import replace
from pathlib import Path

import jinja2
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from bnlab import Classifier
from bnlab.classifier.evaluate import Evaluation, Member, evaluate
from bnlab.classifier.predict import Prediction
from bnlab.data.split_csv import Photo
from bnlab.report.figures import curves
from bnlab.report.page import format_number, mistakes_png, render, write_run_page
from bnlab.runs import Run
from tests.classifier.test_evaluate import KNOWN, answers
from tests.report.test_figures import ROWS, contrast


class Reader(html.parser.HTMLParser):
    """Collects what a page would fetch, and checks that its tags are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.fetched += [v or "" for k, v in attributes if k in ("src", "srcset") or (k == "href" and tag != "use")]
        assert tag not in ("script", "iframe", "object")
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open[-1] in ("html", "tr", "td") and self.open[-1] != tag:
            self.open.pop()
        assert self.open.pop() == tag


def evaluation_page(title: str, evaluation: Evaluation, classifier: str) -> str:
    return render("evaluation.html", title=title, evaluation=evaluation, classifier=classifier, seen=())


def check(page: str) -> Reader:
    reader = Reader(page)
    assert all(address.startswith("data:image/") for address in reader.fetched)
    assert "url(http" not in page
    return reader


def test_the_page_of_a_run_has_all_sections(trained: Path) -> None:
    page = (trained / "report.html").read_text("utf-8")
    reader = check(page)
    assert page.count("<svg") == 2
    for heading in ("Curves", "Classes", "Confusion matrix", "Calibration", "Mistakes", "Recipe", "Environment"):
        assert f"<h2>{heading}</h2>" in page
    assert "network: bn_small_inception  # (yours)" in page
    assert "prefers-color-scheme: dark" in page
    mistakes = re.search(r"Classified wrongly: (\d+) of 12 photos", page)
    assert len(reader.fetched) == (int(mistakes[1]) if mistakes else 0)


def test_a_run_page_has_its_metrics(tmp_path: Path) -> None:
    rows = [row | {"seconds": 90, "images_per_second": 7} for row in ROWS]
    run = Run(tmp_path)
    run.recipe.write_text("a: 1")
    run.environment.write_text('{"p": 1}')
    write_run_page(run, KNOWN, rows, "conv1 to pool2, 5 of 9")
    page = run.report.read_text("utf-8")
    assert "Not trained: conv1 to pool2, 5 of 9." in page
    check(page)
    assert "60.0%" in page
    low, high = KNOWN.top1_interval
    assert f"{low:.1%} – {high:.1%}" in page
    assert "The best epoch is 5 of 5" in page
    assert "top-5" not in page  # useless with three classes


def test_pages_show_no_private_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path / "x" / "mine")
    run.folder.mkdir(parents=True)
    run.recipe.write_text("network: a  # b/c\ninit: '/home/anna/d e/f.safetensors'  # (yours) and/or\n")
    inside = replace(KNOWN, paths=tuple(f"{tmp_path}/data/{i}.png" for i in range(KNOWN.n)))
    write_run_page(run, inside, [row | {"seconds": 90, "images_per_second": 7} for row in ROWS], "")
    page = run.report.read_text("utf-8")
    assert str(tmp_path) not in page
    assert "anna" not in page
    assert "network: a  # b/c\ninit: &#39;f.safetensors&#39;  # (yours) and/or" in page
    assert 'title="data/' in page
    outside = replace(
        KNOWN, paths=("/home/anna/1.png",) * KNOWN.n, members=(Member("/home/anna/a", 1), Member("b/c", 1))
    )
    page = evaluation_page("x", outside, "net")
    assert "anna" not in page
    assert 'title="1.png"' in page
    assert '<th scope="row">b/c</th>' in page


def test_the_page_of_an_ensemble_has_its_members() -> None:
    of_two = replace(KNOWN, crops=144, members=(Member("<a>", 0.25), Member("b\nc", 0.5)))
    page = evaluation_page("x", of_two, "net, 224 px")
    check(page)
    assert "net, 224 px; the mean of 144 crops of each photo" in page
    assert "The probabilities of 2 classifiers are averaged" in page
    assert '<th scope="row">&lt;a&gt;</th><td>25.0%</td>' in page
    assert r'<th scope="row">b\nc</th><td>50.0%</td>' in page
    plain = evaluation_page("x", KNOWN, "net, 224 px")
    assert '<p class="faint">net, 224 px</p>' in plain
    assert "Members" not in plain


def test_names_cannot_break_the_page() -> None:
    nasty = ["<script>alert(1)</script>", 'a"b&c', "x\ny"]
    evaluation = answers(KNOWN.targets.tolist(), KNOWN.probabilities.tolist(), nasty)  # type: ignore[arg-type]
    page = evaluation_page("<b>", evaluation, "net")
    check(page)
    assert "&lt;script&gt;alert(1)" in page
    assert r"x\ny" in page


def test_each_count_of_the_confusion_matrix_can_be_read_in_light_and_dark() -> None:
    """Zeros on the paper, and other counts on the darkest shade, which a row has whose photos are all of one class."""
    page = evaluation_page("x", answers([0, 1], [[1, 0], [0, 1]], ["a", "b"]), "net")
    shade = max(float(fraction) for fraction in re.findall(r"--fraction: ([\d.]+)", page))
    assert page.count(' class="zero">0</td>') == 2
    assert ".matrix .zero { color: var(--faint); }" in page
    modes = re.findall(r":root \{(.*?)\}", page)
    assert len(modes) == 2
    for mode in modes:
        colours = {name: to_rgb(value) for name, value in re.findall(r"--(\w+): (#\w+);", mode)}
        accent = [int(channel) / 255 for channel in re.findall(r"--accent: (\d+) (\d+) (\d+)", mode)[0]]
        cell = [shade * a + (1 - shade) * p for a, p in zip(accent, colours["paper"], strict=True)]
        assert 4.5 <= contrast(colours["faint"], colours["paper"]) < contrast(colours["ink"], colours["paper"]) / 2
        assert contrast(colours["ink"], cell) >= 4.5


def test_many_classes_have_no_confusion_matrix() -> None:
    random = np.random.default_rng(0)
    many = answers(random.integers(0, 60, 90).tolist(), random.dirichlet(np.ones(60), 90).tolist(), ["c"] * 60)  # type: ignore[arg-type]
    page = evaluation_page("x", many, "net")
    check(page)
    assert "Confusion matrix" not in page
    assert "top-5" in page


def test_the_demo_page_with_a_network_that_diverged() -> None:
    page = render(
        "demo.html",
        title="bnlab demo",
        evaluation=KNOWN,
        curves=curves({"with BN": ROWS}),
        outcomes={"with BN": "fine", "without BN": "gone"},
        answers=[Prediction("<photo>", "a", 0.5, ())],
        recipe="",
        environment={},
    )
    check(page)
    assert "gone" in page
    assert "<strong>a</strong><br>50.0%" in page
    assert "&lt;photo&gt;" in page


def test_mistakes_of_missing_photos_are_left_out(trained: Path, tmp_path: Path) -> None:
    photos = [Photo(str(p), "disc", "val", "") for p in sorted((trained.parents[1] / "data/val/ring").iterdir())]
    evaluation = evaluate(Classifier.load(trained / "best.safetensors"), photos, "val")
    assert mistakes_png(evaluation)[:4] == b"\x89PNG"
    assert mistakes_png(KNOWN)[:4] == b"\x89PNG"  # its photos do not exist


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (float("inf"), "∞"),
        (float("-inf"), "−∞"),
        (0, "0"),
        (0.12345, "0.123"),
        (-2.5, "−2.5"),
        (123.4, "123"),
        (12345.6, "12346"),
        (1.5e6, "1.50e+06"),
        (-1.5e-4, "−1.50e−04"),
    ],
)
def test_numbers_are_given_to_three_digits(value: float | None, text: str) -> None:
    assert format_number(value) == text


ABOUT = {
    "title": "t",
    "experiment": {"splits": {"name": "<b>"}, "seeds": [0], "budget": "quick"},
    "reports": [],
    "page": "p",
    "environment": {"a": 1, "date": "d"},
}


def test_values_are_escaped() -> None:
    page = render("studies.html", **ABOUT)
    assert "&lt;b&gt;" in page
    assert "<dt>a</dt><dd>1</dd>" in page


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="experiment"):
        render("studies.html", **{key: value for key, value in ABOUT.items() if key != "experiment"})
