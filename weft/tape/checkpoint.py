"""Keep a block's input alone and run the block once more on the way back.

    forward: y = f(x) without a graph;   backward: f(x) again with one, then its gradients

The bytes kept within the block fall to none, for one more forward pass of it: sqrt(n) blocks of sqrt(n) layers need
memory for about 2 sqrt(n) layers. It is `torch.utils.checkpoint` (not reentrant, random state kept) as a layer to
swap in, so that a plan can choose it block by block; what it recomputes is neither packed nor counted.

Paper: "Training Deep Nets with Sublinear Memory Cost", Tianqi Chen, Bing Xu, Chiyuan Zhang, Carlos Guestrin, 2016,
arXiv:1604.06174.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.claim import Check, claim
from weft.convert import Convertible
from weft.errors import Unsupported
from weft.method import method
from weft.session import kept
from weft.testing.example import Example


@method("checkpoint", contract="layer", family="tape", papers=[], tags={"same-forward", "lean"})
class Checkpoint(Convertible):
    """Any block of a model, recomputed on the way back: ``weft.convert_(model, Checkpoint, where="blocks.*")``.

    Say ``where``: without it the outermost modules are swapped. Names in ``state_dict`` are those of the block itself,
    whose attributes are found too. BatchNorm in training mode would count each batch twice.

    Args:
        layer: the block; used, not copied.

    Raises:
        Unsupported: for what has nothing to recompute or cannot be called, and for BatchNorm in training mode.
    """

    converts = (nn.Module,)

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if isinstance(layer, nn.Identity | nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.Embedding):
            raise Unsupported(f"{type(layer).__name__} has nothing to recompute", "the block around or inside it")
        norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        if any(isinstance(m, norms) and m.training and m.track_running_stats for m in layer.modules()):
            raise Unsupported(
                "BatchNorm in training mode would update its running statistics in both runs", "a tape, or GroupNorm"
            )
        self.layer = layer
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> Checkpoint:
        """The block, recomputed."""
        return cls(layer, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returns."""
        if not torch.is_grad_enabled():
            return self.layer(*args, **kwargs)
        return checkpoint(self.layer, *args, use_reentrant=False, **kwargs)


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}layer.")]:
        state[prefix + key[len(prefix) + len("layer.") :]] = state.pop(key)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    own = {f"{prefix}{name}" for name in module.get_submodule("layer").state_dict()}
    for key in [key for key in state if key in own]:
        state[f"{prefix}layer.{key[len(prefix) :]}"] = state.pop(key)


def example() -> Example:
    """Two layers with a tanh between them."""
    generator = torch.Generator().manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4))
    for p in block.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    return Example(block, torch.randn(5, 6, generator=generator), torch.arange(5) % 4)


@claim(
    "a checkpointed block keeps its input alone; gradients, through dropout too, are those without it",
    mutants={
        "kept as it is": (
            "return checkpoint(self.layer, *args, use_reentrant=False, **kwargs)",
            "return self.layer(*args)",
        ),
        "other random numbers": ("use_reentrant=False", "use_reentrant=False, preserve_rng_state=False"),
    },
)
def input_alone(seed: int) -> list[Check]:
    """Bytes between the passes of a block with dropout, and its gradients, from the same state of torch's generator."""
    generator = torch.Generator().manual_seed(seed)
    block = nn.Sequential(nn.Linear(30, 50), nn.Dropout(0.5), nn.Tanh(), nn.Linear(50, 7)).double()
    for p in block.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    x = torch.randn(40, 30, generator=generator, dtype=torch.float64).requires_grad_()
    found: list[list[Tensor]] = []
    with torch.random.fork_rng(devices=[]):
        for layer in (block, Checkpoint(block)):
            torch.manual_seed(seed)
            with kept(layer) as count:
                out = layer(x)
                held = count.total_bytes
                found.append(list(torch.autograd.grad(out.sin().sum(), [x, *block.parameters()])))
    off = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    return [
        Check(held, x.numel() * 8, "==", what="bytes kept"),
        Check(off, 0.0, "==", what="gradients, largest difference"),
    ]
