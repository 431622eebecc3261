"""Plans of memory: where buffers lie in one block, and how much of a layer is worth moving to the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import combinations

from weft.errors import UsageError, WeftError

__all__ = ["Placement", "fraction", "placement"]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Addresses of buffers, in their order and in the unit of their sizes, and the end of the highest one."""

    addresses: tuple[int, ...]
    peak: int


def placement(
    sizes: Sequence[int], lifetimes: Sequence[tuple[float, float]], *, seconds: float | None = None
) -> Placement:
    """The addresses with the lowest peak, by mixed-integer programming (HiGHS).

        min P   with  a_i + s_i <= P,  and for each pair that is alive together
        a_i + s_i <= a_j + M z_ij,  a_j + s_j <= a_i + M (1 - z_ij),  z_ij in {0, 1},  M the sum of all sizes

    For a network of equal layers, place one layer's buffers first; its peak is then one buffer of the whole, alive
    while the layer runs, once for its forward and once for its backward pass.

    Args:
        sizes: of the buffers, from 0 on.
        lifetimes: first moment of each buffer and the moment at which it is free again.
        seconds: of search, at most; what was found until then is returned, which need not be the lowest.

    Raises:
        UsageError: for lists of unequal lengths, negative sizes and lifetimes that end before they start.
        WeftError: when nothing was found in the time.
    """
    if len(sizes) != len(lifetimes) or any(s < 0 for s in sizes) or any(not a <= b for a, b in lifetimes):
        raise UsageError(f"{len(sizes)} sizes from 0 on and as many lifetimes (start, end) are needed: {lifetimes}")
    count = len(sizes)
    pairs = [
        (i, j)
        for i, j in combinations(range(count), 2)
        if max(lifetimes[i][0], lifetimes[j][0]) < min(lifetimes[i][1], lifetimes[j][1]) and sizes[i] and sizes[j]
    ]
    alive = [sum(s for s, (a, b) in zip(sizes, lifetimes, strict=True) if a <= at < b) for at, _ in lifetimes]
    below = _order(sizes, pairs, max(alive), seconds) if pairs else []
    addresses = [0] * count
    for _ in range(count):  # whole numbers from the order alone: every buffer as low as those below it allow
        for i, j in below:
            addresses[j] = max(addresses[j], addresses[i] + sizes[i])
    return Placement(tuple(addresses), max((a + s for a, s in zip(addresses, sizes, strict=True)), default=0))


def _order(
    sizes: Sequence[int], pairs: list[tuple[int, int]], least: int, seconds: float | None
) -> list[tuple[int, int]]:
    """Which buffer of each pair is the lower one, first; ``least`` is a bound on the peak from below."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_array

    count, unit = len(sizes), max(sizes)  # sizes near 1, as the solver's tolerances are absolute
    scaled = [s / unit for s in sizes]
    total = sum(scaled)
    top, variables = count, count + 1 + len(pairs)
    rows, most = lil_array((count + 2 * len(pairs), variables)), np.zeros(count + 2 * len(pairs))
    for i in range(count):
        rows[i, i], rows[i, top], most[i] = 1, -1, -scaled[i]
    for n, (i, j) in enumerate(pairs):
        z, at = top + 1 + n, count + 2 * n
        rows[at, i], rows[at, j], rows[at, z], most[at] = 1, -1, -total, -scaled[i]
        rows[at + 1, j], rows[at + 1, i], rows[at + 1, z], most[at + 1] = 1, -1, total, total - scaled[j]
    objective, whole, lower = np.zeros(variables), np.zeros(variables), np.zeros(variables)
    upper = np.full(variables, np.inf)  # HiGHS fails on some instances where addresses are bounded by the total
    objective[top], whole[top + 1 :], lower[top], upper[top + 1 :] = 1, 1, least / unit, 1
    options = {"mip_rel_gap": 0.0} | ({} if seconds is None else {"time_limit": seconds})
    constraints = LinearConstraint(rows.tocsr(), -np.inf, most)
    found = milp(objective, integrality=whole, bounds=Bounds(lower, upper), constraints=constraints, options=options)
    if found.x is None:
        raise WeftError(f"no placement of {count} buffers was found: {found.message}; give it more seconds")
    return [(j, i) if found.x[top + 1 + n] > 0.5 else (i, j) for n, (i, j) in enumerate(pairs)]


def fraction(
    whole: float,
    rest: float,
    *,
    seconds: float,
    bandwidth: float,
    layers: int = 1,
    host_bytes: float = math.inf,
) -> float:
    """The largest fraction of tokens whose offload hides behind a layer's computation and fits into the host.

        max alpha,  (whole + alpha rest) / bandwidth <= seconds,  (layers - 2) (whole + alpha rest) <= host_bytes

    The last two layers' activations are wanted back at once and stay, as in the paper.

    Args:
        whole: bytes of a layer that are offloaded whatever the fraction is (its input, the attention's output).
        rest: bytes of a layer that the fraction applies to.
        seconds: of a layer's forward pass.
        bandwidth: to the host, in bytes a second.
        layers: of the model.
        host_bytes: memory of the host.

    Returns:
        From 0 to 1; 0 also where ``whole`` alone takes longer than the computation, which then waits.

    Raises:
        UsageError: for sizes or times below 0, or a bandwidth that is not above 0.
        WeftError: when ``whole`` alone does not fit into the host.
    """
    if min(whole, rest, seconds, layers) < 0 or bandwidth <= 0:
        raise UsageError(f"{whole=}, {rest=}, {seconds=}, {bandwidth=}, {layers=}; sizes and times are from 0 on")
    moved = max(layers - 2, 0)
    if moved * whole > host_bytes:
        raise WeftError(f"{moved} layers of {whole} bytes do not fit into {host_bytes}; use more or larger hosts")
    room = min(seconds * bandwidth, host_bytes / moved if moved else math.inf) - whole
    return 1.0 if room >= rest else room / rest if room > 0 else 0.0
