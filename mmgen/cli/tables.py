"""Tables and lines on the terminal."""

from __future__ import annotations

import sys
from typing import Any


def table_of(*columns: str, title: str | None = None) -> Any:
    """An empty table, its first column to the left, the others to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def show(content: Any, stderr: bool = False) -> None:
    """Prints a table or a text; where the output goes to a file, lines are not broken."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    Console(stderr=stderr, width=None if stream.isatty() else 200).print(content, highlight=False, markup=False, soft_wrap=isinstance(content, str))
