"""Results as tables for the screen. Nothing heavy is imported: `bnlab split` prints its table without torch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bnlab.errors import plural, printable

if TYPE_CHECKING:
    from bnlab.commands.demo import DemoResult
    from bnlab.commands.evaluate import EvaluateResult
    from bnlab.commands.find_lr import FindLrResult
    from bnlab.commands.import_weights import ImportResult
    from bnlab.commands.machine import MachineResult
    from bnlab.commands.net import NetResult
    from bnlab.commands.predict import PredictResult
    from bnlab.commands.split import SplitResult
    from bnlab.commands.study import StudyResult

_MOST_CONFLICTS = 10  # groups of duplicates that are named


def split_table(result: "SplitResult") -> RenderableType:
    """Photos by class and split, then photos that were left out, duplicates and label conflicts."""
    counts = result.split.counts()
    splits = [split for split in ("train", "val", "test") if any(count[split] for count in counts.values())]
    table = _table("class", *splits, "all")
    for label, count in counts.items():
        table.add_row(Text(printable(label)), *(str(count[split]) for split in splits), str(sum(count.values())))
    total = [sum(count[split] for count in counts.values()) for split in splits]
    table.add_section()
    table.add_row("all", *map(str, total), str(sum(total)))
    return Group(table, *_findings(result))


def evaluation_table(result: "EvaluateResult") -> RenderableType:
    evaluation = result.evaluation
    low, high = evaluation.top1_interval
    figures = Table.grid(padding=(0, 2))
    figures.add_row("read", f"{evaluation.split}, n = {evaluation.n}")
    if evaluation.crops > 1:
        figures.add_row("averaged over", f"{evaluation.crops} crops of each photo")
    for member in evaluation.members:
        figures.add_row("top-1 alone", Text(f"{member.top1:.1%}  {printable(member.classifier)}"))
    top1 = f"top-1 of the {len(evaluation.members)} together" if evaluation.members else "top-1"
    figures.add_row(top1, f"{evaluation.top1:.1%}  (95% interval {low:.1%} to {high:.1%})")
    if len(evaluation.classes) > 5:
        figures.add_row("top-5", f"{evaluation.top5:.1%}")
    figures.add_row("calibration error (ECE)", f"{evaluation.ece:.3f}")
    table = _table("class", "photos", "precision", "recall", "F1", "most often predicted as")
    for i, score in enumerate(evaluation.per_class):
        row = evaluation.confusion[i].copy()
        row[i] = 0
        wrong = f"{printable(evaluation.classes[row.argmax()])} ({row.max()})" if row.max() else ""
        scores = ("–" if value is None else f"{value:.1%}" for value in (score.precision, score.recall, score.f1))
        table.add_row(Text(printable(score.label)), str(score.n), *scores, Text(wrong))
    return Group(figures, "", table)


def learning_rate_table(result: "FindLrResult") -> RenderableType:
    found, curve = result.suggestion, result.test.curve
    table = _table("learning rate", "", justify="left")
    for rate, meaning in (
        (found.steepest, "the loss falls fastest"),
        (found.lowest, "the loss is lowest"),
        (found.tenth_of_minimum, "a tenth of the above"),
        (curve.diverged_at, "the training diverges"),
    ):
        table.add_row("–" if rate is None else f"{rate:.2g}", meaning)
    tried = f"tried {curve.rates[0]:.2g} to {curve.rates[-1]:.2g} in {plural(len(curve.rates), 'step')}"
    answer = "none" if found.suggested is None else f"{found.suggested:g}"
    return Group(table, "", Text(f"{tried}; suggested: {answer} ({found.reason})"))


def prediction_table(result: "PredictResult") -> RenderableType:
    width = max(len(p.top) for p in result.predictions)
    table = _table("photo", "class", "probability", *(["others"] if width > 1 else []), justify="left")
    for p in result.predictions:
        if p.error:
            table.add_row(Text(printable(p.path)), Text("cannot be used", style="yellow"))
        else:
            rest = ", ".join(f"{printable(c.label)} {c.probability:.1%}" for c in p.top[1:])
            table.add_row(
                Text(printable(p.path)), Text(printable(str(p.label)), style="bold"), f"{p.probability:.1%}", Text(rest)
            )
    return table


def import_lines(result: "ImportResult") -> str:
    card, conversion = result.card, result.conversion
    preprocessing = f"{card.preprocessing.size} px, {card.preprocessing.resize}"
    lines = [
        f"{printable(result.options.file)}: {conversion.format.summary}, as {card.network} "
        f"(variant {card.arguments['variant']}), classes: {len(card.classes)}, {preprocessing}"
    ]
    if conversion.format.guessed:
        lines.append("if these are weights of a bnlab network, pass --format bnlab")
    if conversion.merged:
        lines.append(f"biases merged into the batch normalisation that follows them: {conversion.merged}")
    if conversion.dropped:
        lines.append(f"left out: {plural(len(conversion.dropped), 'tensor')} of auxiliary heads")
    return "\n".join(lines)


def demo_table(result: "DemoResult") -> RenderableType:
    outcomes = _table("network", "outcome", justify="left")
    for name, trained in result.networks.items():
        outcomes.add_row(name, trained.outcome())
    answers = _table("held-out digit", "class", "probability", justify="left")
    for p in result.answers:
        answers.add_row(Text(printable(p.path)), Text(str(p.label), style="bold"), f"{p.probability:.1%}")
    return Group(outcomes, "", answers)


def network_list(networks: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = _table("network", "description", "variants", "stems", justify="left")
    for network in networks:
        variants = network["variants"] if len(network["variants"]) > 1 else []
        table.add_row(network["name"], Text(network["summary"]), ", ".join(variants), ", ".join(network["stems"]))
    return table


def network_table(result: "NetResult", *, by_part: bool) -> RenderableType:
    """A network's layers; or their parts, without their fraction, for which there is no space."""
    fraction = [] if by_part else ["share"]
    table = _table("layer", "kind", "output", "parameters", "multiply-adds", *fraction)
    table.columns[1].justify = "left"
    total = result.multiply_adds

    def numbers(parameters: int, multiply_adds: int) -> list[str]:
        fraction = [] if by_part else [f"{multiply_adds / total:.1%}"]
        return [f"{parameters:,}", f"{multiply_adds:,}", *fraction]

    for row in (part for layer in result.layers for part in (layer.parts if by_part else [layer])):
        output = " x ".join(map(str, row.output))
        table.add_row(row.name, row.kind, output, *numbers(row.parameters, row.multiply_adds))
    table.add_section()
    table.add_row("total", "", "", *numbers(result.parameters, total))
    return table


def counting_note(result: "NetResult") -> str:
    channels = result.arguments["in_channels"]
    heads = " The auxiliary heads are included; they run in training only."
    return (
        f"Multiply-adds of convolutions and linear layers for one image, {channels} x {result.size} x {result.size};\n"
        f"biases, normalisation, pooling and activations are not counted.{heads if result.auxiliary else ''}"
    )


def _findings(result: "SplitResult") -> list[RenderableType]:
    split = result.split
    lines: list[RenderableType] = []
    if split.refused:
        verb = "is" if len(split.refused) == 1 else "are"
        lines.append(Text(f"{plural(len(split.refused), 'photo')} cannot be used and {verb} left out"))
    conflicts = split.conflicts
    labelled_twice = set(conflicts)
    alike = [group for group in split.groups if group not in labelled_twice]
    if alike:
        photos, groups = sum(len(group.members) for group in alike), plural(len(alike), "group")
        lines.append(Text(f"{photos} photos are duplicates ({groups}), each group in one split"))
    for group in conflicts[:_MOST_CONFLICTS]:
        names = " = ".join(
            f"{printable(split.photos[i].path)} ({printable(split.photos[i].label)})" for i in group.members
        )
        lines.append(Text("label conflict: ", style="yellow") + Text(names))
    if len(conflicts) > _MOST_CONFLICTS:
        lines.append(Text(f"and {len(conflicts) - _MOST_CONFLICTS} more label conflicts", style="yellow"))
    return lines


def _table(first: str, *others: str, justify: str = "right") -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if justify == "left" else "right", overflow="fold")
    return table


def machine_table(result: "MachineResult") -> RenderableType:
    found = result.environment
    table = Table.grid(padding=(0, 2))
    rows = {
        "system": found["system"],
        "processor": f"{found['processor']}, {plural(found['cores'], 'usable core')}, {found['threads']} threads",
        "free memory": f"{result.free_memory / 2**30:.1f} GiB",
        "device": found["device"] + (f" ({found['gpu']})" if found["gpu"] else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        "process": ", ".join([result.tuning, *(f"{name}={value}" for name, value in found["tuned"].items())]),
        "precision": f"auto is {result.precision}",
    }
    rows |= {what: f"{rate:.0f} GFLOP/s" for what, rate in result.gflops.items()}
    for name, value in rows.items():
        table.add_row(name, Text(printable(value)))
    return table


def study_list(studies: Sequence[Mapping[str, str]]) -> RenderableType:
    parts: list[RenderableType] = []
    for row in studies:
        head = Text.assemble((row["study"], "bold"), f"  {row['title']}")
        parts += [head, Padding(Text(f"{row['claim']} ({row['source']})", style="dim"), (0, 0, 0, 2), expand=False)]
    return Group(*parts)


def study_table(result: "StudyResult") -> RenderableType:
    from bnlab.report.html import format_number

    parts: list[RenderableType] = []
    for report in result.reports:
        experiment, conclusion = report.experiment, report.conclusion
        parts += [Text(f"{report.study.name}: {conclusion.verdict}", style="bold"), Text(report.study.claim)]
        about = [experiment.splits.name, plural(len(experiment.seeds), "seed"), f"budget {experiment.budget}"]
        about += [f"{key} {value}" for key, value in experiment.options.items()]
        parts.append(Text(", ".join(about), style="dim"))
        table = _table("clause", "range", "mean", "interval", "verdict")
        for each in conclusion.evidence:
            low, high = each.interval
            secondary = "" if each.primary else " (secondary)"
            table.add_row(
                Text(each.what + secondary),
                f"{each.claimed} {each.unit}".replace("-", "−"),
                format_number(each.mean),
                f"{format_number(low)} to {format_number(high)}",
                str(each.verdict),
            )
        parts += [table, *(Text(f"{remark}.") for remark in conclusion.remarks), Text("")]
    return Group(*parts[:-1])
