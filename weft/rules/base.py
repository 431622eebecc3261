"""The contract of a learning rule: what replaces ``loss.backward()`` in an ordinary training loop."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import stages
from weft.errors import DataError, Unsupported, UsageError
from weft.ops.auxiliary import loss_scale
from weft.rules.batch import IGNORED, check_batch, check_finite, check_labels, cross_entropy, explain, flat, inputs
from weft.rules.gradients import add_gradients, gathered, hand_over

__all__ = ["IGNORED", "Ready", "Rule", "Scale", "check_finite", "check_labels", "inputs"]

Ready = Callable[[nn.Parameter], None]
Scale = float | Tensor


class Rule(nn.Module):
    """A way of finding gradients: ``rule.step(x, y)`` in place of ``loss.backward()``.

    A subclass implements :meth:`step`, and ``__init__`` where it has options. Every ``step`` is checked on the way
    in (batch, labels, dtypes) and out (a finite loss), and counted for :meth:`rng`.

    Args:
        model: the user's model. It is trained in place, unless the rule's card is tagged ``own-model``.
        loss: from scores ``[B, K]`` and labels ``[B]`` to their mean loss.
        at: modules to cut behind, for rules that need stages; see :func:`weft.stages.cut`.
        seed: of everything random that the rule draws; torch's global generator is never touched.

    Attributes:
        window: (rows before this part, rows in all) where the batch of a step is part of a larger one, counting rows
            that have a label other than -100; None where it is whole.

    Raises:
        Unsupported: when the rule cannot train this model; ``instead`` says what can.
        StageError: when the model cannot be cut as asked.
    """

    updates: ClassVar[str] = "grad"
    trains: ClassVar[str] = "model"  # the submodule whose names users know; a session's globs are matched with them
    stages: str = "none"
    method_name: str = ""
    shardable: ClassVar[bool] = False  # whether the model's parameters may be sharded over processes
    sharded = False

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[..., Tensor] = F.cross_entropy,
        at: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if self.stages == "none" and at is not None:
            raise UsageError(f"{type(self).__name__} needs no stages; leave at= out")
        self.model = model
        self.loss = loss
        self.clock = [int(seed), 0]
        self.cut = stages.cut(model, at) if self.stages != "none" else None
        self.window: tuple[int, int] | None = None
        self._fixed: dict[Any, Tensor] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "step" in cls.__dict__:
            cls.step = _guarded(cls.__dict__["step"])  # type: ignore[method-assign]

    def trainable(self) -> list[nn.Parameter]:
        """Exactly what an optimizer gets: the parameters of model and rule that require gradients, each once."""
        return [p for p in gathered(self) if p.requires_grad]

    def step(self, x: Any, y: Tensor, *, scale: Scale = 1.0, ready: Ready | None = None) -> Tensor:
        """Add ``scale`` x gradient to ``.grad`` of every parameter in :meth:`trainable`.

        Args:
            x: inputs ``[B, ...]``, or a tuple that is passed as ``model(*x)``.
            y: labels ``[B]`` or ``[B, T]``, int64; -100 is ignored.
            scale: a factor on the gradients, e.g. ``scaler.scale(torch.ones(()))`` or a weight of this batch.
            ready: called once with each parameter as soon as its gradient is final (as torch's
                ``register_post_accumulate_grad_hook``); it may update the parameter and set ``.grad`` to None.

        Returns:
            The mean loss, a detached scalar.

        Raises:
            DataError: for an empty batch or labels of the wrong shape, dtype or range.
            NonFinite: for a loss that is not finite; then nothing is added to any gradient (by ``backward="stage"``, to
                none of the stages that have not had their turn).
        """
        raise Unsupported(f"{type(self).__name__} implements no step")

    def forward(self, x: Any) -> Tensor:
        """Class scores ``[B, K]`` or ``[B, T, K]``, however the rule predicts; without side effect."""
        return self.model(*inputs(x))

    def rng(self, *tags: Any, fixed: bool = False, device: Any = "cpu") -> torch.Generator:
        """A private generator, seeded by (seed, number of steps so far, tags); by (seed, tags) where ``fixed``."""
        seed, count = self.clock
        key = repr((seed, None if fixed else count, tags)).encode()
        digest = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        return torch.Generator(device=device).manual_seed(digest % 2**63)

    def per_row(self, draw: Callable[[int, torch.Generator], Tensor], rows: int, *tags: Any) -> Tensor:
        """What a step draws for each row of its batch, by the row's place in the whole batch.

        So a batch that processes or micro-batches share draws what it draws whole; :attr:`window` says which part this
        is, and the clock must be the same for all parts.

        Args:
            draw: from (rows in all, generator) to a tensor ``[rows in all, ...]``.
            rows: B, of this step, without those that are ignored.
            tags: as in :meth:`rng`.
        """
        first, whole = self.window or (0, rows)
        return draw(whole, self.rng(*tags))[first : first + rows]

    def fixed_normal(self, shape: Sequence[int], like: Tensor, *tags: Any) -> Tensor:
        """A standard normal matrix that stays the same for the life of the rule, drawn when first asked for.

        It depends on the seed, the tags and the shape alone, and is therefore not part of the state.
        """
        key = (self.clock[0], tuple(shape), like.dtype, like.device, tags)
        if key not in self._fixed:
            drawn = torch.randn(*shape, generator=self.rng(*tags, fixed=True), dtype=torch.float64)
            self._fixed[key] = drawn.to(like.device, like.dtype)
        return self._fixed[key]

    def get_extra_state(self) -> Tensor:
        """The seed and the number of steps taken, int64 ``[2]``: all that the rule's random numbers depend on."""
        return torch.tensor(self.clock)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from a saved seed and number of steps."""
        self.clock = [int(v) for v in state]

    def extra_parameters(self) -> int:
        """Numbers that the rule holds beside the model: its own parameters and fixed random matrices."""
        model = {id(p) for p in self.model.parameters()}
        own = sum(p.numel() for p in self.parameters() if id(p) not in model)
        return own + sum(t.numel() for t in self._fixed.values())

    def groups(self) -> list[list[nn.Parameter]]:
        """Trained parameters by stage, in forward order: what a ``local`` rule trains apart; known after a step."""
        if self.cut is None:
            return [self.trainable()]
        wanted = {id(p) for p in self.trainable()}
        return [[p for p in self.cut.parameters(k) if id(p) in wanted] for k in range(len(self.cut))]

    def grow(self, epoch: int) -> bool:
        """Called after each epoch; True when :meth:`trainable` changed, so that the optimizer must be built anew."""
        return False

    def structure(self) -> dict[str, Any]:
        """JSON data, enough to rebuild a rule that has grown before ``load_state_dict``."""
        return {}

    def rebuild(self, structure: dict[str, Any]) -> None:
        """Grow to what :meth:`structure` gave, so that ``load_state_dict`` fits.

        Raises:
            Unsupported: for a rule that does not grow.
        """
        raise Unsupported(f"{type(self).__name__} does not grow", "a checkpoint of this rule")

    def diagnose(self, x: Any, y: Tensor) -> list[str]:
        """Reasons, with what to try, why the rule may learn nothing on a batch without an error; by default none.

        Called on a copy, so that a step is free.
        """
        return []

    def reduce(self, group: Any) -> None:
        """Bring the rule's own running state together across processes: before the first step, and after every one.

        Args:
            group: a :class:`weft.processes.Group`; gradients are added up elsewhere.

        Raises:
            Unsupported: when there is such state and the rule does not say how.
        """
        if self.updates == "self":
            raise Unsupported(f"{type(self).__name__} changes the weights itself", "one process")
        model = {id(b) for b in self.model.buffers()}
        own = [n for n, b in self.named_buffers() if id(b) not in model]
        if own:
            raise Unsupported(f"{type(self).__name__} has running state {own} and no way to reduce it", "one process")

    def criterion(self, scores: Tensor, y: Tensor) -> Tensor:
        """The mean loss of scores ``[B, K]`` or ``[B, T, K]`` for labels ``[B]`` or ``[B, T]``.

        Raises:
            DataError: when the labels do not fit the scores.
        """
        if not isinstance(scores, Tensor):
            raise DataError(f"the model gives a {type(scores).__name__}; wrap it so that it gives a tensor of scores")
        scores, y = flat(scores, y)
        return cross_entropy(scores, y) if self.loss is F.cross_entropy else self.loss(scores, y)

    def descend(
        self,
        tensors: Sequence[Tensor],
        parameters: Iterable[Tensor],
        *,
        gradients: Sequence[Tensor | None] | None = None,
        scale: Scale = 1.0,
        ready: Ready | None = None,
    ) -> None:
        """Add ``scale`` x the gradient of the sum of ``tensors`` to ``.grad`` of ``parameters``, and of nothing else.

        Args:
            tensors: scalar losses, or other tensors with their ``gradients``.
            parameters: leaves; one that no tensor depends on gets a gradient of zeros.
            gradients: what arrives at each tensor, None for a scalar loss.
            scale: a factor on all of it.
            ready: see :meth:`step`.

        Raises:
            NonFinite: for a scalar loss that is not finite, before anything is added.
        """
        check_finite([t for t in tensors if t.ndim == 0])
        leaves = list(parameters)
        if not leaves:
            return
        given = gradients or [None] * len(tensors)
        heads = [(t, g) for t, g in zip(tensors, given, strict=True) if t.requires_grad]
        if tensors and not heads:
            raise UsageError(
                "there is nothing to differentiate: step runs under no_grad, or the model detaches its output"
            )
        whole = isinstance(scale, float) and scale == 1.0
        arriving = [
            g if whole else torch.as_tensor(scale, dtype=t.dtype, device=t.device) if g is None else g * scale
            for t, g in heads
        ]
        if self.sharded:  # what the graph holds are the gathered weights, known to torch's own backward alone
            if heads:
                torch.autograd.backward([t for t, _ in heads], arriving)
            for leaf in leaves:
                leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            return
        outputs = [t for t, _ in heads]
        if ready is not None:
            hand_over(outputs, arriving, leaves, ready)
            return
        found: Sequence[Tensor | None] = (None,) * len(leaves)  # backward(inputs=...) copies every gradient, grad none
        if heads:
            found = torch.autograd.grad(outputs, leaves, arriving, allow_unused=True)
        add_gradients(leaves, found, [g for g in arriving if g is not None])


def _guarded(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A rule's own ``step`` with the checks that all share."""

    @functools.wraps(step)
    def guarded(self: Rule, x: Any, y: Tensor, *, scale: Scale = 1.0, ready: Ready | None = None) -> Tensor:
        if self.updates == "self" and (ready is not None or isinstance(scale, Tensor) or scale != 1.0):
            raise UsageError(f"{type(self).__name__} changes the weights itself; it takes neither scale nor ready")
        check_batch(x, y)
        if self.loss is F.cross_entropy and y.dtype != torch.int64:
            raise DataError(f"labels are class indices of dtype torch.int64, not {y.dtype}")
        try:
            with loss_scale(scale):
                loss = step(self, x, y, scale=scale, ready=ready).detach()
            check_finite([loss])
        except Exception:
            explain(self.model, x, y)
            raise
        self.clock[1] += 1
        return loss

    return guarded
