"""transformers' own progress bars, which would be drawn over whatever the program shows on its terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging


@contextmanager
def without_bars() -> Iterator[None]:
    """In the block, loading and saving draw no bars; those of downloads from a hub, which take long, stay."""
    before = logging.set_tqdm_hook(_no_bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _no_bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return logging.EmptyTqdm(*args, **kwargs)
