"""What of a mapped file a process would not have to fetch."""

from __future__ import annotations

import platform
import re
from pathlib import Path

CAN_FAULT_IN = tuple(int(n) for n in re.findall(r"\d+", platform.release())[:2]) >= (5, 14)


def in_page_table(path: Path) -> int:
    """Bytes of the file, or of all files of the folder, that are in this process's page table."""
    kib, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(path) in line
        elif ours and line.startswith("Rss:"):
            kib += int(line.split()[1])
    return kib << 10
