"""One layer's rows, from their plan until the last of them is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from moeray.dispatch.flight import Flight, Sent
from moeray.dispatch.on_device import OnDevice
from moeray.dispatch.pieces import Backlog
from moeray.dispatch.plan import Ints, Plan, Share
from moeray.dispatch.view import Usable
from moeray.errors import MoerayError
from moeray.wire.frame import Frame
from moeray.wire.rows import put_rows


@dataclass
class Work:
    """Rows are in the `flight`, in the `backlog`, or `waiting`: those of `orphans`, experts that had no replica when
    the view was at `version`, the first of them at `waited_from`. `failed`: who failed at an expert, with
    `failed_rows` of it. `compute_s`: what each actor says that it computed; `heard_at`: when it last
    answered. `device`: where the tokens and outputs are, if that is not the host's memory; x_TD and out_TKD are its
    then."""

    layer: int
    x_TD: Tensor
    ids_TK: Tensor
    out_TKD: Tensor
    began: float
    flight: Flight
    backlog: Backlog = field(default_factory=Backlog)
    waiting: list[Ints] = field(default_factory=list)
    orphans: set[int] = field(default_factory=set)
    version: int = -1
    waited_from: float = 0.0
    failed: dict[int, str] = field(default_factory=dict)
    failed_rows: set[int] = field(default_factory=set)
    compute_s: dict[str, float] = field(default_factory=dict)
    heard_at: dict[str, float] = field(default_factory=dict)
    device: OnDevice | None = None

    @property
    def row_bytes(self) -> int:
        return self.x_TD.shape[1] * self.x_TD.itemsize

    @property
    def home_x_TD(self) -> Tensor:
        """The tokens in the host's memory."""
        return self.x_TD if self.device is None else self.device.home_x_TD

    def take(self, sent: Sent, frame: Frame) -> bool:
        """Put a RESULT's outputs where they belong; False where they do not fit the rows sent. Raises WireError."""
        rows, device = sent.share.rows, self.device
        if device is None:
            return put_rows(frame.tensors, rows, self.out_TKD)
        on_device = device.take(sent.channel, frame, rows)
        if on_device is not None:
            return on_device
        fits = put_rows(frame.tensors, rows, device.home_out_TKD)
        if fits:
            device.came_home(rows)
        return fits

    @property
    def rows_waiting(self) -> int:
        return sum(rows_R.size for rows_R in self.waiting)

    def replicas(self, now: Usable) -> Mapping[int, Sequence[str]]:
        """The layer's usable replicas; an actor that failed at an expert is passed over where there is another."""
        replicas = now.replicas.get(self.layer, {})
        if not self.failed:
            return replicas
        others = {e: tuple(a for a in replicas.get(e, ()) if a != actor) for e, actor in self.failed.items()}
        return {**replicas, **{expert: actors for expert, actors in others.items() if actors}}

    def wait(self, plan: Plan, version: int, now: float) -> None:
        """The plan's orphans wait for a view newer than `version`, by which it was made."""
        self.version = min(self.version, version) if self.waiting else version
        self.waited_from = self.waited_from or now
        self.orphans |= set(plan.orphans)
        self.waiting.append(plan.orphan_rows_R)

    def take_waiting(self) -> Ints:
        """All rows that wait; they do so no longer."""
        rows_R, self.waiting, self.orphans = np.concatenate(self.waiting), [], set()
        return rows_R

    def answered(self, sent: Sent, compute_s: float, now: float) -> float:
        """Note an answer. Seconds that its actor took, since it was sent the rows or was done with those before."""
        actor_id = sent.share.actor_id
        self.compute_s[actor_id] = self.compute_s.get(actor_id, 0.0) + compute_s
        began, self.heard_at[actor_id] = max(sent.at, self.heard_at.get(actor_id, sent.at)), now
        return now - began

    def fail(self, share: Share, message: str) -> None:
        """A forward failed in an actor that is well: its rows get one more try. Raises MoerayError after that."""
        rows = share.rows_R.tolist()
        if not self.failed_rows.isdisjoint(rows):
            expert = next(expert for expert in share.experts if expert in self.failed)
            before = self.failed[expert]
            where = f"on {before} and then on {share.actor_id}" if before != share.actor_id else f"on {before}"
            raise MoerayError(
                f"expert {expert} of layer {self.layer} failed twice, {where}: {message}; the actor's log has the cause"
            )
        self.failed_rows.update(rows)
        self.failed.update(dict.fromkeys(share.experts, share.actor_id))
