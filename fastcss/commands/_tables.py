"""Writes a continual run's results as tables and in words, in per cent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

NAMED = 5  # so many classes of a task are named; of more, the rest is counted


def task_table(records: Sequence[dict], title: str) -> Table:
    """Tabulate the mIoU of old, new and all classes after every task; a record may bring its own ``"name"``."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("after task", "new classes", title=escape(title))
    for column in ("old", "new", "all"):
        table.add_column(column, justify="right")
    for record in records:
        name = record.get("name", str(record["task"]))
        table.add_row(name, few(record["classes"]), *(percent(record[of]) for of in ("old", "new", "all")))
    return table


def summary_line(summary: dict) -> str:
    """Return the results of all tasks as one line."""
    names = {
        "first": "first task", "later": "later ones", "all": "all",
        "last_iou": "Last-IoU", "avg_iou": "Avg-IoU", "ff_iou": "FF-IoU",
    }  # fmt: skip
    return "  ".join(f"{name} {percent(summary[key])}" for key, name in names.items())


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def few(names: Sequence[str]) -> str:
    if len(names) <= NAMED:
        return ", ".join(names)
    shown = NAMED - 1
    return f"{', '.join(names[:shown])} and {len(names) - shown} more"


def learned_in(classes: int, tasks: int) -> str:
    name = "class" if classes == 1 else "classes"
    return f"{classes} {name}, learned in {f'{tasks} tasks, one after the other' if tasks > 1 else 'one task'}"
