"""What a figure was measured on: recorded with every result."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moeray import __version__


def environment() -> dict[str, Any]:
    """Machine and versions, as plain data."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "moeray": __version__,
        "torch": torch.__version__,
        "ray": version("ray"),
        "transformers": version("transformers"),
    }


def surroundings() -> dict[str, Any]:
    """The environment, and how busy the machine is besides (its load average of the last minute)."""
    return {"environment": environment(), "load_average": os.getloadavg()[0]}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
