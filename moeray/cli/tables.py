"""Tables of figures that fit into 80 columns: no lines between the columns, and nothing is cut as long as it fits."""

from __future__ import annotations

from rich.table import Table


def narrow(title: str, *columns: str) -> Table:
    """Without rows yet; figures stand at the right of their columns."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
