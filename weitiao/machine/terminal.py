"""Tables for a person: as wide as the terminal on one, and as wide as they are where the output is piped.

show(table)
"""

from __future__ import annotations

import io
from typing import Any

WIDE = 100_000  # columns of what is no terminal, where nothing may be wrapped: grep and cut read whole lines


def show(table: Any) -> None:
    """Print something of rich's on stdout."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(table)
        return
    text = io.StringIO()
    Console(file=text, width=WIDE).print(table)
    print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))
