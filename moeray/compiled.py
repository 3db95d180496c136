"""The parts in C that were compiled when the package was installed; each has a form in Python with the same meaning."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import Any

log = logging.getLogger(__name__)

REBUILD = "install moeray again where there is a C compiler (pip install --force-reinstall --no-deps moeray)"


@cache
def compiled(module: str) -> Any | None:
    """The module, or None (with one warning) where it was not compiled or does not load."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        log.warning("%s is not there (%s), so Python does its work, slower; %s", module, error, REBUILD)
        return None
