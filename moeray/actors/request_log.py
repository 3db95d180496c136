"""What a router's log says of each request: that it was taken, and how it ended. One line at INFO for each end."""

from __future__ import annotations

import logging

from moeray.actors.life import Life
from moeray.errors import MoerayError
from moeray.logs import REQUESTS, log_names
from moeray.types import FinishReason, GenerationRequest

log = logging.getLogger(REQUESTS)


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


def ended(life: Life, reason: FinishReason, now: float, error: str | None = None) -> None:
    """The attempt is over; `ABORT` means that whoever had submitted it, or this router's drain, wanted no more."""
    fields = _figures(life, now)
    first = f", the first after {fields['ttft_s']} s" if "ttft_s" in fields else ""
    log.info(
        "ended (%s): %d prompt tokens (%d cached), %d generated%s, %s s in all%s",
        reason.value, fields["prompt_tokens"], life.cached_tokens, life.given, first, fields["e2e_s"],
        f"; {error}" if error else "",
        extra={**_names(life.request), "finish_reason": reason.value, **fields},
    )  # fmt: skip


def _names(request: GenerationRequest) -> dict[str, object]:
    return {**log_names(request.request_id, request.origin), "attempt": request.attempt}


def _figures(life: Life, now: float) -> dict[str, object]:
    """Token counts, and seconds from the arrival here."""
    figures: dict[str, object] = {
        "prompt_tokens": life.prompt_tokens,
        "cached_tokens": life.cached_tokens,
        "output_tokens": life.given,
        "e2e_s": round(now - life.arrived, 4),
    }
    if life.first_token is not None and life.last_token is not None:
        figures["ttft_s"] = round(life.first_token - life.arrived, 4)
        if life.given > 1:
            figures["tpot_s"] = round((life.last_token - life.first_token) / (life.given - 1), 4)
    return figures
