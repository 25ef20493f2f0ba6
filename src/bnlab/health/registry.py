"""All checks, and how they are chosen and run."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from bnlab.errors import UsageError, plural
from bnlab.health import checks as folder
from bnlab.health.check import HEADINGS, SEVERITIES, Check, Finding, sections
from bnlab.health.evidence import PARTS, Evidence


@dataclass(frozen=True)
class Entry:
    """A check with its function and its page."""

    check: Check
    run: Callable[[Evidence], list[Finding]]
    title: str
    sections: dict[str, str]
    """text by heading, in the order of HEADINGS"""
    file: str
    """name of its file in `checks/`, without .py"""

    def page(self) -> str:
        """The check's page in Markdown."""
        about = self.check
        lines = [f"# {about.id} {about.name}", "", self.title, ""]
        lines += [f"*Severity* {about.severity}, *stage* {about.stage}, *remedy* {about.safety}.", ""]
        if about.needs or about.images:
            needs = [PARTS[part] for part in about.needs]
            needs += [f"at least {plural(about.images, 'image')}"] * bool(about.images)
            lines += [f"It needs {'; '.join(needs)}.", ""]
        for heading, text in self.sections.items():
            lines += [f"## {heading}", "", text, ""]
        return "\n".join(lines)


@cache
def all_checks() -> tuple[Entry, ...]:
    """The checks in the order of their ids."""
    names = sorted(path.stem for path in Path(*folder.__path__).glob("*.py") if path.stem != "__init__")
    entries = [_entry(import_module(f"{folder.__name__}.{name}"), name) for name in names]
    return tuple(sorted(entries, key=lambda entry: entry.check.id))


def _entry(module: ModuleType, name: str) -> Entry:
    title, found = sections(module.__doc__ or "")
    assert tuple(found) == HEADINGS, f"the headings of {name} are {tuple(found)}"
    return Entry(check=module.CHECK, run=module.check, title=title, sections=found, file=name)


def find_check(word: str) -> Entry:
    """The check with this id or name.

    Raises:
        UsageError: there is none.
    """
    known = {key: entry for entry in all_checks() for key in (entry.check.id.lower(), entry.check.name)}
    entry = known.get(word.lower())
    if entry is None:
        near = get_close_matches(word.lower(), known, n=1)
        name = known[near[0]].check if near else None
        raise UsageError(
            f"there is no check '{word}'",
            f"did you mean '{name.name}' ({name.id})?"
            if name
            else "pass one id or name, such as BN102 or stale-statistics",
        )
    return entry


def chosen(select: Iterable[str] = (), ignore: Iterable[str] = ()) -> list[Entry]:
    """The checks that are selected (by default all), without those to ignore; both by id or name."""
    select, ignore = ([words] if isinstance(words, str) else words for words in (select, ignore))
    ignored = {find_check(word).check.id for word in ignore}
    wanted = {find_check(word).check.id for word in select} or {entry.check.id for entry in all_checks()}
    return [entry for entry in all_checks() if entry.check.id in wanted - ignored]


def run_checks(
    evidence: Evidence, entries: Collection[Entry] | None = None
) -> tuple[tuple[Finding, ...], dict[str, str]]:
    """The findings, the worst first, and the checks that lack evidence, by id, with what they need."""
    findings: list[Finding] = []
    skipped: dict[str, str] = {}
    for entry in all_checks() if entries is None else entries:
        check = entry.check
        missing = [PARTS[part] for part in check.needs if not evidence.has(part)]
        if missing:
            skipped[check.id] = f"it needs {'; '.join(missing)}"
        elif evidence.images < check.images:
            skipped[check.id] = f"it needs at least {check.images} images, and got {evidence.images}"
        else:
            findings += entry.run(evidence)
    order = {severity: i for i, severity in enumerate(SEVERITIES)}
    cost = {id(f): -f.cost.gain if f.cost else 0.0 for f in findings}
    return tuple(sorted(findings, key=lambda f: (order[f.severity], cost[id(f)], f.id))), skipped
