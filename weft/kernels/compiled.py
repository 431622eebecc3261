"""How a kernel becomes an operator of torch, how it is compiled for the CPU, and how threads share a call.

To add kernels: a file in ``weft/kernels/cpu`` with loops under `kernel`, one in ``weft/kernels/cuda`` for Triton, both
imported only inside the functions that run there, and one beside this that checks what a caller gives and registers the
operator with its reference. What a loop for CPUs calls stands in the loop's own file: the machine code on disk is taken
as long as that file and the CPU's features are the same.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from weft.errors import UsageError

GRAIN = 1 << 18  # elements; fewer cost less than a thread's start
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NATIVE = (torch.float32, torch.bfloat16)  # what the kernels read and write themselves

counting = 0  # countings of operations that are going on: a call past torch's dispatcher would not be among them

_operators: dict[str, dict[str, Callable[..., Any]]] = {}  # by name: what each runs
_lock = threading.RLock()
_log = logging.getLogger("weft")


def operator(
    schema: str, reference: Callable[..., Any], *, fake: Callable[..., Any], cpu: Callable[..., Any],
    cuda: Callable[..., Any], derivative: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """The operator ``torch.ops.weft.NAME``, which `torch.compile` takes as one step.

    Registered piece by piece, as `torch.library.custom_op` imports the whole compiler at an operator's first call.

    Args:
        schema: ``"NAME(Tensor x, int bits) -> Tensor"``; results share no memory with arguments.
        reference: in plain torch; runs on every other device, on CUDA without Triton and on big-endian CPUs, whose
            words the loops would read the wrong way round.
        fake: makes results of the right shapes and dtypes.
        cpu: calls a `Kernel`.
        cuda: launches Triton; what it imports may be missing.
        derivative: ``(setup_context, backward)``, as `torch.library.register_autograd` takes them; without them the
            operator has none, and a function above it has.
    """

    def on_cuda(*args: Any) -> Any:
        try:
            return cuda(*args)
        except ImportError:
            return reference(*args)

    name = schema.partition("(")[0]
    new = name not in _operators
    native = cpu if sys.byteorder == "little" else reference
    _operators[name] = {"default": reference, "cpu": native, "cuda": on_cuda, "fake": fake}
    if derivative:
        _operators[name] |= dict(zip(("keep", "back"), derivative, strict=True))

    def by(kind: str) -> Callable[..., Any]:
        return lambda *args, **given: _operators[name][kind](*args, **given)

    if new:  # torch knows an operator for good; a file that is run again replaces what it does
        torch.library.define(f"weft::{name}", schema.removeprefix(name), tags=(torch.Tag.pt2_compliant_tag,))
        for kind in ("default", "cpu", "cuda"):
            torch.library.impl(f"weft::{name}", kind, by(kind))
        torch.library.register_fake(f"weft::{name}", by("fake"))
        if derivative:
            torch.library.register_autograd(f"weft::{name}", by("back"), setup_context=by("keep"))
    found: Callable[..., Any] = getattr(torch.ops.weft, name).default
    return found


def operations_of(*names: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Says how many floating-point operations operators take, as `torch.utils.flop_counter.register_flop_formula`."""
    targets = [getattr(torch.ops.weft, name) for name in names]
    for target in targets:
        flop_registry.pop(target, None)
    return register_flop_formula(targets)


@contextlib.contextmanager
def dispatched() -> Iterator[None]:
    """Inside, in every thread, layers call operators and nothing past torch's dispatcher, so that modes see them."""
    global counting
    with _lock:
        counting += 1
    try:
        yield
    finally:
        with _lock:
            counting -= 1


class Kernel:
    """A loop in Python that runs as machine code, once it has been compiled for its one signature.

    Args:
        loop: writes into arrays that it is given and returns nothing.
        signature: as Numba writes it.
        fastmath: LLVM's flags for sums and products of floats; ``contract`` lets it fuse the two.
    """

    def __init__(self, loop: Callable[..., None], signature: str, fastmath: frozenset[str] = frozenset()) -> None:
        self.loop, self.signature, self.fastmath = loop, signature, fastmath
        self.dispatcher: Any = None  # Numba's
        self._compiled: Callable[..., None] | None = None

    def __call__(self, *args: Any) -> None:
        (self._compiled or self.compile())(*args)

    def compile(self) -> Callable[..., None]:
        """The machine code: from this process, from disk, or compiled now; a long wait is announced by the logger."""
        import numba

        with _lock:
            if self._compiled is None:
                options: dict[str, Any] = {"error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True}
                options["fastmath"] = set(self.fastmath)
                try:
                    found = numba.njit(cache=True, **options)(self.loop)
                except RuntimeError:  # neither the package's folder nor the user's cache can be written
                    found = numba.njit(**options)(self.loop)
                notice = threading.Timer(1.0, self._announce, [found])
                notice.daemon = True
                notice.start()
                try:
                    found.compile(self.signature)
                finally:
                    notice.cancel()
                found.disable_compile()
                self.dispatcher, (code,) = found, found.overloads.values()
                # Numba's own call looks at the types of all arguments first: half of what a call costs.
                self._compiled = code.entry_point
            return self._compiled

    @contextlib.contextmanager
    def followed(self, then: Callable[..., object]) -> Iterator[None]:
        """Inside, in every thread, ``then`` is called after each run, with its arguments: so that a check sees the run.

        What has fetched the machine code before, by `compile`, runs it alone.
        """
        code = self.compile()

        def run(*args: Any) -> None:
            code(*args)
            then(*args)

        self._compiled = run
        try:
            yield
        finally:
            self._compiled = code

    def _announce(self, found: Any) -> None:
        if found.stats.cache_misses or not found.stats.cache_path:
            _log.warning("weft: compiling the kernel %s for this CPU, once ...", self.loop.__name__)


def kernel(signature: str, *, fastmath: Iterable[str] = ()) -> Callable[[Callable[..., None]], Kernel]:
    """Makes a `Kernel` of the loop below it."""
    return lambda loop: Kernel(loop, signature, frozenset(fastmath))


def share(run: Callable[[int, int], None], size: int, unit: int) -> None:
    """Calls ``run(start, stop)`` on parts of ``range(size)``, on as many threads as torch uses.

    The threads live as long as the call: none is left to a fork, and calls from several threads do not meet.

    Args:
        run: writes what belongs to its part alone, and releases the interpreter.
        size: elements in all.
        unit: parts start at its multiples.
    """
    parts = min(torch.get_num_threads(), size // GRAIN)
    if parts <= 1:
        run(0, size)
        return
    step = max(1, -(-size // (parts * unit))) * unit
    failed: list[BaseException] = []

    def guarded(start: int) -> None:
        try:
            run(start, min(start + step, size))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=[start]) for start in range(step, size, step)]
    for thread in threads:
        thread.start()
    guarded(0)
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    """Raise UsageError unless ``low <= value <= high``, a whole number."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or not low <= value <= high:
        raise UsageError(f"{name}={value!r}: give a whole number from {low} to {high}")


def check_tensor(name: str, tensor: Any, dtypes: tuple[torch.dtype, ...], ndim: int | None = None) -> Tensor:
    """The tensor, detached; UsageError for another layout, dtype or number of dimensions."""
    if not isinstance(tensor, Tensor):
        raise UsageError(f"{name} is a {type(tensor).__name__}: give a tensor")
    if tensor.layout != torch.strided:
        raise UsageError(f"{name} has the layout {tensor.layout}: give a dense tensor, {name}.to_dense()")
    if tensor.dtype not in dtypes:
        raise UsageError(f"{name} has the dtype {tensor.dtype}: give one of {', '.join(map(str, dtypes))}")
    if ndim is not None and tensor.ndim != ndim:
        raise UsageError(f"{name} has the shape {tuple(tensor.shape)}: give {ndim} dimension(s)")
    return tensor.detach()
