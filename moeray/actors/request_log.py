"""What a router's log says of each request: that it was taken, and how it ended. One line at INFO for each end."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from moeray.errors import MoerayError
from moeray.logs import REQUESTS, log_names
from moeray.types import FinishReason, GenerationRequest

log = logging.getLogger(REQUESTS)


@dataclass
class Progress:
    """One attempt at a request so far. `tokens` are those generated here; times are of one monotonic clock."""

    request: GenerationRequest
    arrived: float
    first_token: float | None = None
    last_token: float | None = None
    tokens: int = 0
    cached_tokens: int = 0


def taken(request: GenerationRequest) -> None:
    """The router has queued the request."""
    if request.attempt == 0:
        log.debug("taken: %d prompt tokens", len(request.prompt_ids), extra=_names(request))
    else:
        done = len(request.output_ids)
        log.info("taken over as attempt %d, behind %d tokens", request.attempt, done, extra=_names(request))


def refused(request_id: str, origin: str, error: MoerayError) -> None:
    """The router has not taken the request."""
    log.info("refused: %s", error, extra=log_names(request_id, origin))


def ended(progress: Progress, reason: FinishReason, now: float, error: str | None = None) -> None:
    """The attempt is over; `ABORT` means that whoever had submitted it, or this router's drain, wanted no more."""
    fields = _figures(progress, now)
    first = f", the first after {fields['ttft_s']} s" if "ttft_s" in fields else ""
    log.info(
        "ended (%s): %d prompt tokens (%d cached), %d generated%s, %s s in all%s",
        reason.value, fields["prompt_tokens"], progress.cached_tokens, progress.tokens, first, fields["e2e_s"],
        f"; {error}" if error else "",
        extra={**_names(progress.request), "finish_reason": reason.value, **fields},
    )  # fmt: skip


def _names(request: GenerationRequest) -> dict[str, object]:
    return {**log_names(request.request_id, request.origin), "attempt": request.attempt}


def _figures(progress: Progress, now: float) -> dict[str, object]:
    """Token counts, and seconds from the arrival here."""
    figures: dict[str, object] = {
        "prompt_tokens": len(progress.request.prompt_ids),
        "cached_tokens": progress.cached_tokens,
        "output_tokens": progress.tokens,
        "e2e_s": round(now - progress.arrived, 4),
    }
    if progress.first_token is not None and progress.last_token is not None:
        figures["ttft_s"] = round(progress.first_token - progress.arrived, 4)
        if progress.tokens > 1:
            figures["tpot_s"] = round((progress.last_token - progress.first_token) / (progress.tokens - 1), 4)
    return figures
