"""A simulated router: what it has to do, shared out into steps as the engine's scheduler does."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from moeray.control.reports import RouterReport


@dataclass(eq=False, slots=True)
class SimRouter:
    """A router's sequences and the run of equal steps that it is in: `steps` of `step_s` each since `began`."""

    name: str
    closing: bool = False
    waiting: deque[int] = field(default_factory=deque)
    prefills: list[list[int]] = field(default_factory=list)  # [request, tokens left], oldest first
    decodes: list[tuple[int, int]] = field(default_factory=list)  # heap of (last step, request)
    context: int = 0  # tokens that the decoding sequences attend to, of all together
    step: int = 0
    takes: list[int] = field(default_factory=list)
    began: float = 0.0
    step_s: float = 0.0
    attention_s: float = 0.0  # of a step
    steps: int = 0
    waking: bool = False  # its next step is the first after a rest
    credited: int = 0
    worked: float = 0.0  # steps that are in `steps_by_tokens`
    tokens: int = 0
    busy: float = 0.0  # how busy it keeps the busiest actor
    plan: int = 0  # counts the plans, so that an outdated event is known
    outstanding: int = 0  # requests that it has not finished
    expert_s: float = 0.0  # of a step, the part in which it waits for expert actors
    totals: list[float] = field(default_factory=lambda: [0.0] * 7)  # as RouterReport's, from steps on
    requests: int = 0
    late: int = 0

    @property
    def running(self) -> int:
        return len(self.prefills) + len(self.decodes)

    def report(self, prompts: Sequence[int]) -> RouterReport:
        """What it would tell the controller now; `prompts`: tokens of each request's."""
        pending = sum(left for _, left in self.prefills) + sum(prompts[i] for i in self.waiting)
        if self.takes:
            pending -= int(self.worked) * sum(self.takes)
        steps, step_s, expert_s, decode_tokens, decode_s, prefill_tokens, prefill_s = self.totals
        return RouterReport(
            self.name, "1", self.running, len(self.waiting), pending_tokens=pending, steps=int(steps), step_s=step_s,
            expert_s=expert_s, decode_tokens=int(decode_tokens), decode_s=decode_s,
            prefill_tokens=int(prefill_tokens), prefill_s=prefill_s, requests=self.requests, late=self.late,
        )  # fmt: skip

    def cut(self, now: float) -> bool:
        """End the run of equal steps with the step that it is in; False where that is the last one anyway."""
        current = int((now - self.began) / self.step_s) + 1 if self.steps else 0
        if current >= self.steps:
            return False
        self.steps = current
        return True

    def share_out(self, budget: int, prompts: Sequence[int], max_running: int) -> list[int]:
        """Tokens of a step for each of the first prefills, as `Scheduler._prefills` shares them out: it takes in who
        waits while some of the budget is left."""
        takes: list[int] = []
        while budget:
            if len(takes) == len(self.prefills):
                if not self.waiting or self.running >= max_running:
                    break
                request = self.waiting.popleft()
                self.prefills.append([request, prompts[request]])
            left, half = self.prefills[len(takes)][1], (budget + 1) // 2
            take = left if left < half else half
            takes.append(take)
            budget -= take
        for i, take in enumerate(takes):
            if not budget:
                break
            left = self.prefills[i][1] - take
            more = left if left < budget else budget
            takes[i] += more
            budget -= more
        return takes
