"""Sections in the terminal."""

from __future__ import annotations

from typing import Any

__all__ = ["print_sections", "text_of", "title_of"]

GIB = 2**30
WIDTH = 100  # of tables in a file or pipe


def text_of(key: str, value: Any) -> str:
    """A cell of a table: in the unit that reads best for its key's suffix."""
    if not isinstance(value, int | float):
        return str(value)
    if key.endswith("_bytes"):
        return f"{value / GIB:.2f} GiB"
    if key.endswith("tokens_per_s"):
        return f"{value:,.0f}"
    if key.endswith("_per_s"):
        return f"{value:.2f}"
    if key.endswith("_s"):
        return f"{value * 1000:,.1f} ms"
    if key.endswith("share"):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def title_of(key: str) -> str:
    """A column's title: units that the cells show are dropped."""
    for suffix in ("_bytes", "_share"):
        key = key.removesuffix(suffix)
    if key.endswith("_per_s"):
        return key.removesuffix("_per_s").replace("_", " ") + "/s"
    return key.removesuffix("_s").replace("_", " ")


def print_sections(report: dict[str, Any]) -> None:
    """Every list of rows as a table; other values are left to the caller."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    for name, section in report.items():
        if not (isinstance(section, list) and section and isinstance(section[0], dict)):
            continue
        table = Table(title=name, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for key, value in section[0].items():
            table.add_column(title_of(key), justify="left" if isinstance(value, str) else "right")
        for row in section:
            table.add_row(*(text_of(key, value) for key, value in row.items()))
        console.print(table)
