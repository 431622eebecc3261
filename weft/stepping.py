"""One batch of a training run: its gradients, whole or in parts, limited and checked before an optimizer's turn."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft import processes
from weft.errors import NonFinite, Unsupported, UsageError, WeftError, unknown
from weft.processes import Group
from weft.rules.batch import IGNORED, rows_used

if TYPE_CHECKING:
    from weft.data import Dataset
    from weft.session import Tape


class Stepper:
    """Steps of a rule on batches of a data set, each as a whole, in micro-batches or shared by processes.

    Args:
        rule: any rule.
        data: a :class:`weft.data.Dataset`.
        group: the processes that share every batch.
        clip: the largest norm of all gradients together; None or infinite: no limit.
        accumulate: the micro-batches that a process's part of a batch is cut into.
        autocast: ``"bfloat16"``, ``"float16"`` or None.
        tape: what packs the tensors kept between the passes of each step, or None.

    Raises:
        UsageError: for options that make no sense.
        Unsupported: when a graph, whose nodes are one batch, would be cut.
    """

    def __init__(
        self,
        rule: Any,
        data: Dataset,
        group: Group,
        *,
        clip: float | None,
        accumulate: int,
        autocast: str | None,
        tape: Tape | None = None,
    ) -> None:
        if autocast not in (None, "bfloat16", "float16"):
            raise UsageError(unknown("autocast", str(autocast), ["bfloat16", "float16"]))
        if clip is not None and not clip > 0:
            raise UsageError(f"clip={clip}; it is a positive number")
        if data.kind == "graph" and (accumulate > 1 or group.size > 1):
            given = f"accumulate={accumulate} with {group.size} process{'es' * (group.size > 1)}"
            raise Unsupported(
                f"the nodes of a graph are one batch, which {given} would cut", "accumulate=1, one process"
            )
        self.rule, self.data, self.group = rule, data, group
        self.clip = None if clip == math.inf else clip
        self.accumulate, self.autocast, self.tape = accumulate, autocast, tape

    def join(self, smallest: int) -> None:
        """Begin together with the other processes: the same weights everywhere, and a rule that can be shared.

        Args:
            smallest: the rows of the smallest batch.

        Raises:
            Unsupported: when the rule has state of its own and no way to bring it together.
            UsageError: when a batch cannot be cut into equal numbers of parts for a sharded model.
        """
        if self.group.size == 1:
            return
        self.rule.reduce(self.group)
        if self.rule.sharded and smallest // self.group.size < self.accumulate:
            raise UsageError(
                f"the smallest batch has {smallest} rows for {self.group.size} processes and "
                f"accumulate={self.accumulate}; a sharded model needs a row in every part: change batch_size"
            )
        if not self.rule.sharded:
            self.group.copy([*self.rule.parameters(), *(b for b in self.rule.buffers() if b.numel())])

    def step(self, index: Tensor, wanted: bool) -> tuple[float, bool]:
        """Add the gradients of the rows ``index`` to ``.grad``, or let a rule change the weights itself.

        Args:
            index: rows of the training part, ``[B]``.
            wanted: whether this process wants a checkpoint after the step.

        Returns:
            The loss of the whole batch, and whether the first process wanted a checkpoint.
        """
        if self.group.size == 1 and self.accumulate == 1:
            around = self._around(self.rule.clock[1], 0) if self.tape or self.autocast else contextlib.nullcontext()
            with around:
                return float(self.rule.step(*self._rows(index))), wanted
        return self._in_parts(index, wanted)

    def _rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the training part; `index_select` takes a fraction of the time of ``x[index]``."""
        return self.data.x_train.index_select(0, index), self.data.y_train.index_select(0, index)

    def _in_parts(self, index: Tensor, wanted: bool) -> tuple[float, bool]:
        """A batch in parts, one for each process, each in micro-batches; every part weighs as many as it has labels."""
        y, group = self.data.y_train[index], self.group
        labels, rows = max(1, int((y != IGNORED).sum())), rows_used(y)
        clock, start, loss, mine = self.rule.clock[1], 0, 0.0, 0.0
        failed: Exception | None = None
        try:
            for rank, own in enumerate(index.tensor_split(group.size)):
                for part in own.tensor_split(max(1, min(self.accumulate, len(own)))):
                    x, y = self._rows(part)
                    share = int((y != IGNORED).sum()) / labels
                    if rank == group.rank and (share or not rows):
                        self.rule.window, self.rule.clock[1] = (start, rows), clock
                        how = {} if self.rule.updates == "self" else {"scale": share}
                        with self._around(clock, start):
                            loss += share * float(self.rule.step(x, y, **how))
                        mine += share
                    start += rows_used(y)
        except Exception as error:
            if group.size == 1:
                raise
            failed = error
        finally:
            self.rule.window = None
        if group.size > 1:
            loss, want, broken = group.total([loss, wanted and not group.rank, failed is not None])
            wanted = bool(want)
            if failed is not None:
                raise failed
            if broken:
                raise WeftError("another process of this run has failed in this step; its message says why")
            self._add_up(mine)
        self.rule.clock[1] = clock + 1
        return loss, wanted

    def _add_up(self, mine: float) -> None:
        """Gradients and running statistics over all processes; ``mine`` is this one's share of the batch."""
        for p in self.rule.trainable() if self.rule.updates != "self" else ():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.group.add(p.grad for p in self.rule.trainable() if p.grad is not None)
        self.group.mean(processes.statistics(self.rule), mine)
        self.rule.reduce(self.group)

    @contextlib.contextmanager
    def _around(self, clock: int, start: int) -> Iterator[None]:
        """The precision and the tape of one part of a batch; what the tape draws depends on the step and the part."""
        with contextlib.ExitStack() as stack:
            if self.autocast is not None:
                kind = self.data.x_train.device.type
                stack.enter_context(torch.autocast(kind, getattr(torch, self.autocast)))
            if self.tape is not None:
                self.tape.clock = (clock << 24) + start
                stack.enter_context(self.tape.on(self.rule))
            yield

    def limit(self) -> None:
        """Scale all gradients down together where their norm is larger than ``clip``."""
        if self.clip is None:
            return
        gradients = [p.grad for p in self.rule.trainable() if p.grad is not None]
        if not self.rule.sharded:
            torch.nn.utils.clip_grad_norm_(self.rule.trainable(), self.clip)
        elif (norm := self.group.norm(gradients)) > self.clip:
            for gradient in gradients:
                gradient.mul_(self.clip / (norm + 1e-6))

    def check_finite(self, when: str) -> None:
        """Raise NonFinite, naming parameters, when gradients or weights are not finite; ``when`` opens the message."""
        named = [(name, p) for name, p in self.rule.named_parameters() if p.requires_grad]
        found = [t for _, p in named for t in (p.grad, p.detach()) if t is not None]
        if not found or math.isfinite(self.group.norm(found)):
            return
        whole = [(n, [processes.whole(t) for t in (p.grad, p.detach()) if t is not None]) for n, p in named]
        names = [n for n, both in whole if not all(torch.isfinite(t).all() for t in both)]
        raise NonFinite(
            f"{when}: gradients or weights that are not finite in {', '.join(names[:5])}"
            f"{' and others' * (len(names) > 5)}; lower the learning rate, or clip gradients (clip=1.0)"
        )
