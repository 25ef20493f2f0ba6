"""Results as tables for the screen. Nothing heavy is imported: `bnlab split` prints its table without torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bnlab.errors import plural, printable

if TYPE_CHECKING:
    from bnlab.classifier.predict import Prediction
    from bnlab.commands import demo, evaluate, import_weights, net, predict, split, study, train

_MOST_CONFLICTS = 10  # groups of duplicates that are named


def split_table(result: "split.SplitResult") -> RenderableType:
    """Photos by class and split, then photos that were left out, duplicates and label conflicts."""
    from bnlab.data.scan import refused_number

    counts = result.counts
    names = [name for name in ("train", "val", "test") if any(count[name] for count in counts.values())]
    rows = [[label, *(count[name] for name in names), sum(count.values())] for label, count in counts.items()]
    total = [sum(count[name] for count in counts.values()) for name in names]
    lines = []
    if result.refused:
        verb = "is" if len(result.refused) == 1 else "are"
        lines.append(Text(f"{refused_number(result.refused)} cannot be used and {verb} left out"))
    conflicts = result.label_conflicts
    alike = [group for group in result.duplicates if len(set(group.labels)) == 1]
    if alike:
        photos, groups = sum(len(group.photos) for group in alike), plural(len(alike), "group")
        lines.append(Text(f"{photos} photos are duplicates ({groups}), each group in one split"))
    for group in conflicts[:_MOST_CONFLICTS]:
        same = " = ".join(f"{printable(photo.path)} ({printable(photo.label)})" for photo in group.photos)
        lines.append(Text("label conflict: ", style="yellow") + Text(same))
    if len(conflicts) > _MOST_CONFLICTS:
        lines.append(Text(f"and {plural(len(conflicts) - _MOST_CONFLICTS, 'more label conflict')}", style="yellow"))
    return Group(_table(("class", *names, "all"), [*rows, ["all", *total, sum(total)]]), *lines)


def evaluation_table(result: "evaluate.EvaluateResult") -> RenderableType:
    evaluation = result.evaluation
    low, high = evaluation.top1_interval
    figures = [("read", f"{evaluation.split}, n = {evaluation.n}")]
    if evaluation.crops > 1:
        figures.append(("averaged over", f"{evaluation.crops} crops of each photo"))
    figures += [("top-1 alone", f"{member.top1:.1%}  {member.classifier}") for member in evaluation.members]
    top1 = f"top-1 of the {len(evaluation.members)} together" if evaluation.members else "top-1"
    figures.append((top1, f"{evaluation.top1:.1%}  (95% interval {low:.1%} to {high:.1%})"))
    if len(evaluation.classes) > 5:
        figures.append(("top-5", f"{evaluation.top5:.1%}"))
    figures.append(("calibration error (ECE)", f"{evaluation.ece:.3f}"))
    rows = []
    for i, score in enumerate(evaluation.per_class):
        wrong = evaluation.confusion[i].copy()
        wrong[i] = 0
        most = f"{evaluation.classes[wrong.argmax()]} ({wrong.max()})" if wrong.max() else ""
        scores = ("–" if value is None else f"{value:.1%}" for value in (score.precision, score.recall, score.f1))
        rows.append((score.label, score.n, *scores, most))
    columns = ("class", "photos", "precision", "recall", "F1", "most often predicted as")
    return Group(_grid(figures), "", _table(columns, rows))


def learning_rate_table(result: "train.FindLrResult") -> RenderableType:
    found, curve = result.suggestion, result.test.curve
    rates = {
        "the loss falls fastest": found.steepest,
        "the loss is lowest": found.lowest,
        "a tenth of the above": found.tenth_of_minimum,
        "the training diverges": curve.diverged_at,
    }
    rows = [("–" if rate is None else f"{rate:.2g}", meaning) for meaning, rate in rates.items()]
    tried = f"tried {curve.rates[0]:.2g} to {curve.rates[-1]:.2g} in {plural(len(curve.rates), 'step')}"
    answer = "none" if found.suggested is None else f"{found.suggested:g}"
    summary = Text(f"{tried}; suggested: {answer} ({found.reason})")
    return Group(_table(("learning rate", ""), rows, justify="left"), "", summary)


def prediction_table(result: "predict.PredictResult") -> RenderableType:
    others = ["others"] if any(len(prediction.top) > 1 for prediction in result.predictions) else []
    rows: list[Sequence[object]] = []
    for prediction in result.predictions:
        if prediction.error:
            rows.append((prediction.path, Text("cannot be used", style="yellow")))
        else:
            rest = ", ".join(f"{other.label} {other.probability:.1%}" for other in prediction.top[1:])
            rows.append((*_answer(prediction), *([rest] if others else [])))
    return _table(("photo", "class", "probability", *others), rows, justify="left")


def import_lines(result: "import_weights.ImportResult") -> str:
    card, conversion = result.card, result.conversion
    preprocessing = f"{card.preprocessing.size} px, {card.preprocessing.resize}"
    lines = [
        f"{printable(result.options.file)}: {conversion.format.summary}, as {card.network} "
        f"(variant {card.arguments['variant']}), classes: {len(card.classes)}, {preprocessing}"
    ]
    if conversion.format.guessed:
        lines.append("if these are weights of a bnlab network, pass --format bnlab")
    if conversion.prefix:
        lines.append(f"read without what the names of its tensors begin with: {printable(conversion.prefix)}")
    if conversion.others:
        first = printable(conversion.others[0])
        lines.append(f"left out: {plural(len(conversion.others), 'tensor')} outside of the network, such as {first}")
    if conversion.merged:
        lines.append(f"biases merged into the batch normalisation that follows them: {conversion.merged}")
    if conversion.dropped:
        lines.append(f"left out: {plural(len(conversion.dropped), 'tensor')} of auxiliary heads")
    return "\n".join(lines)


def demo_table(result: "demo.DemoResult") -> RenderableType:
    outcomes = [(name, trained.outcome()) for name, trained in result.networks.items()]
    return Group(
        _table(("network", "outcome"), outcomes, justify="left"),
        "",
        _table(("held-out digit", "class", "probability"), map(_answer, result.answers), justify="left"),
    )


def network_list(networks: Sequence[Mapping[str, Any]]) -> RenderableType:
    rows = []
    for network in networks:
        variants = network["variants"] if len(network["variants"]) > 1 else []
        rows.append((network["name"], network["summary"], ", ".join(variants), ", ".join(network["stems"])))
    return _table(("network", "description", "variants", "stems"), rows, justify="left")


def network_table(result: "net.NetResult", *, by_part: bool) -> RenderableType:
    """A network's layers; or their parts, without their fraction, for which there is no space."""

    def row(name: str, kind: str, output: Sequence[int], parameters: int, multiply_adds: int) -> Sequence[str]:
        fraction = [] if by_part else [f"{multiply_adds / result.multiply_adds:.1%}"]
        return [name, kind, " x ".join(map(str, output)), f"{parameters:,}", f"{multiply_adds:,}", *fraction]

    layers = [part for layer in result.layers for part in (layer.parts if by_part else [layer])]
    rows = [row(each.name, each.kind, each.output, each.parameters, each.multiply_adds) for each in layers]
    rows.append(row("total", "", (), result.parameters, result.multiply_adds))
    columns = ("layer", "kind", "output", "parameters", "multiply-adds", *([] if by_part else ["share"]))
    table = _table(columns, rows)
    table.columns[1].justify = "left"
    return table


def counting_note(result: "net.NetResult", *, auxiliary: bool) -> str:
    heads = " The auxiliary heads are included; they run in training only."
    return (
        f"Multiply-adds of convolutions and linear layers for one image, "
        f"{result.arguments['in_channels']} x {result.size} x {result.size};\n"
        f"biases, normalisation, pooling and activations are not counted.{heads if auxiliary else ''}"
    )


def machine_table(machine: Mapping[str, Any]) -> RenderableType:
    threads = f"{plural(machine['cores'], 'usable core')}, {plural(machine['threads'], 'thread')}"
    rows = {
        "system": machine["system"],
        "processor": f"{machine['processor']}, {threads}",
        "free memory": f"{machine['free_memory'] / 2**30:.1f} GiB",
        "device": machine["device"] + (f" ({machine['gpu']})" if machine["gpu"] else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "process": ", ".join([machine["tuning"], *(f"{name}={value}" for name, value in machine["tuned"].items())]),
        "precision": f"auto is {machine['precision']}",
    }
    return _grid([*rows.items(), *((what, f"{rate:.0f} GFLOP/s") for what, rate in machine["gflops"].items())])


def study_list(studies: Sequence[Mapping[str, str]]) -> RenderableType:
    parts: list[RenderableType] = []
    for row in studies:
        head = Text.assemble((row["study"], "bold"), f"  {row['title']}")
        parts += [head, Padding(Text(f"{row['claim']} ({row['source']})", style="dim"), (0, 0, 0, 2), expand=False)]
    return Group(*parts)


def study_table(result: "study.StudyResult") -> RenderableType:
    from bnlab.report.page import format_number

    parts: list[RenderableType] = []
    for report in result.reports:
        experiment, conclusion = report.experiment, report.conclusion
        about = [experiment.splits.name, plural(len(experiment.seeds), "seed"), f"budget {experiment.budget}"]
        about += [f"{key} {value}" for key, value in experiment.options.items()]
        rows = []
        for each in conclusion.evidence:
            low, high = map(format_number, each.interval)
            what = each.what if each.primary else f"{each.what} (secondary)"
            claimed = f"{each.claimed} {each.unit}".replace("-", "−")
            rows.append((what, claimed, format_number(each.mean), f"{low} to {high}", each.verdict))
        parts += [
            Text(f"{report.study.name}: {conclusion.verdict}", style="bold"),
            Text(report.study.claim),
            Text(", ".join(about), style="dim"),
            _table(("clause", "range", "mean", "interval", "verdict"), rows),
            *(Text(f"{remark}.") for remark in conclusion.remarks),
            Text(""),
        ]
    return Group(*parts[:-1])


def _answer(prediction: "Prediction") -> Sequence[object]:
    label = Text(printable(str(prediction.label)), style="bold")
    return prediction.path, label, f"{prediction.probability:.1%}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]], justify: JustifyMethod = "right") -> Table:
    """Columns with a header; all but the first have their text on the side `justify`."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for number, name in enumerate(columns):
        table.add_column(name, justify=justify if number else "left", overflow="fold")
    return _filled(table, rows)


def _grid(rows: Iterable[Sequence[object]]) -> Table:
    return _filled(Table.grid(padding=(0, 2)), rows)


def _filled(table: Table, rows: Iterable[Sequence[object]]) -> Table:
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(printable(str(cell))) for cell in row))
    return table
