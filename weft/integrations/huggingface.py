"""Weft and Hugging Face transformers: models that rules and tapes can take, recipes inside its Trainer, text as data.

Needs the extra ``weft[huggingface]``. transformers is imported when something here is used, and nothing is fetched
from the network: models and tokenizers are instances or folders on the disk.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from weft.errors import Unsupported, UsageError, WeftError
from weft.integrations.texts import TextData, text_classification, transformers_library
from weft.recipe import Recipe
from weft.specs import apply_conversions, read_tape

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from weft.session import Session

__all__ = ["Classifier", "TextData", "WeftCallback", "load", "text_classification"]

POOLINGS = ("mean",)


class Classifier(nn.Module):
    """A transformers model as Weft calls models: token ids in, class scores ``[B, K]`` out. Made by `load`.

    Attributes:
        model: the transformers model, under its own names; its blocks are where rules cut by default.
        head: the linear map from the mean over tokens to scores, or None where ``model`` has a head of its own.
    """

    def __init__(self, model: nn.Module, head: nn.Linear | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.model, self.head = model, head
        self.dropout = nn.Dropout(dropout)
        self.training = self.dropout.training = model.training  # as loaded: transformers gives models for evaluation

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Scores ``[B, K]``.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, T]``, 1 for tokens and 0 for padding; None: all are tokens.
            inputs: whatever else the model takes, by name (``token_type_ids``).

        Raises:
            UsageError: for a batch that the model cannot pad, since its configuration names no padding token.
        """
        model: Any = self.model
        if "use_cache" in inspect.signature(model.forward).parameters:
            inputs = {"use_cache": False, **inputs}  # keys and values of generation are no use in one pass
        try:
            out = model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **inputs)
        except ValueError as error:
            if getattr(model.config, "pad_token_id", None) is not None or len(input_ids) == 1:
                raise
            raise UsageError(
                f"{type(model).__name__} finds the last token of a text by the padding token, and its configuration "
                "has none: give load(..., pad_token_id=tokenizer.pad_token_id)"
            ) from error
        if self.head is None:
            return out.logits
        hidden = out.last_hidden_state
        if attention_mask is None:
            return self.head(self.dropout(hidden.mean(1)))
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.head(self.dropout((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)))


def load(
    model: str | Path | nn.Module,
    num_labels: int | None = None,
    *,
    pooling: str | None = None,
    dropout: float = 0.1,
    pad_token_id: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Classifier:
    """A transformers model for classifying sequences, ready for rules, tapes, `weft.measure` and `weft.convert_`.

    It is called as ``classifier(input_ids, attention_mask)`` and returns scores ``[B, K]``; a batch for Weft is the
    tuple ``(input_ids, attention_mask)``. Default cuts are the blocks (``model.bert.encoder.layer.0``, ...). A
    folder's model is in evaluation mode, as transformers loads it.

    Args:
        model: a folder as ``save_pretrained`` writes it, or an instance, which is used itself, not a copy.
        num_labels: K; by default that of the configuration.
        pooling: None for the class that transformers has for classifying sequences with this architecture; ``"mean"``
            for the bare encoder, the mean over the tokens of a text and a new linear map, as for sentence encoders. Its
            own pooler, of which nothing would be used, is taken off then.
        dropout: before the new linear map of ``pooling="mean"``.
        pad_token_id: the padding token, for configurations that name none (GPT-2, Llama).
        seed: of parameters that the folder does not hold.
        options: for transformers' ``from_pretrained`` (``dtype``, ``attn_implementation``, ...).

    Raises:
        UsageError: no such folder (names on the Hub are not looked up), options with an instance, another number of
            labels than the instance has.
        WeftError: transformers is not installed, or cannot load the folder.
    """
    if pooling is not None and pooling not in POOLINGS:
        raise UsageError(f"pooling={pooling!r}; it is None or {POOLINGS[0]!r}")
    if pooling is not None and num_labels is None:
        raise UsageError("pooling='mean' makes a new linear map: give num_labels")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not isinstance(model, nn.Module):
            net: Any = _from_folder(Path(model), None if pooling else num_labels, bool(pooling), options)
        elif options:
            raise UsageError(f"{', '.join(options)}: these are for loading a folder, and an instance was given")
        else:
            net = model
        if pad_token_id is not None:
            net.config.pad_token_id = pad_token_id
        if pooling is None:
            has = getattr(getattr(net, "config", None), "num_labels", None)
            if num_labels is not None and has != num_labels:
                raise UsageError(f"num_labels={num_labels}, and {type(net).__name__} gives {has} scores")
            return Classifier(net)
        if isinstance(getattr(net, "pooler", None), nn.Module):
            net.pooler = None
        assert num_labels is not None
        weight = next(net.parameters())
        head = nn.Linear(net.config.hidden_size, num_labels, device=weight.device, dtype=weight.dtype)
        return Classifier(net, head, dropout)


def _from_folder(folder: Path, num_labels: int | None, bare: bool, options: Mapping[str, Any]) -> nn.Module:
    transformers = transformers_library()
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder} is no folder with a config.json, as save_pretrained writes it. Nothing is fetched from the Hub "
            "here: download the model first (hf download NAME --local-dir FOLDER)"
        )
    kind = transformers.AutoModel if bare else transformers.AutoModelForSequenceClassification
    labels = {} if num_labels is None else {"num_labels": num_labels}
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, **labels, **options)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise WeftError(f"transformers cannot load {folder}: {type(error).__name__}: {error}") from error


# WeftCallback without its base class, which is imported when the callback is first asked for.
@dataclass(eq=False)
class _Events:
    """A recipe's tape and conversions inside transformers' ``Trainer``: ``Trainer(..., callbacks=[callback])``.

    Layers are swapped when the Trainer is made, before it builds its optimizer. The tape packs what the forward
    passes of every training step save; with gradient accumulation, all those of one optimizer step. Evaluation and
    saving are outside. Layers stay swapped after training: `weft.restore_` puts the ordinary ones back.

    A Trainer does not tell its callbacks of an exception inside a step, and the session would stay open after it:
    in the caller's thread, what is computed next would be packed too. So train inside the callback's own context,
    which ends the session in every case::

        with WeftCallback("recipe.yaml") as callback:
            Trainer(model=model, args=args, callbacks=[callback], ...).train()

    Without it, the next training with such a callback in this thread ends the session, or `close` does.

    Attributes:
        recipe: as a checked `weft.Recipe`.
        swapped: names of the layers that were swapped.

    Args:
        recipe: a `weft.Recipe`, a mapping such as ``{"tape": "quantise:bits=4"}``, or the path of a YAML file. Its
            tape and conversions count; model, data, optimizer, epochs and precision are the Trainer's own matters.

    Raises:
        RecipeError: for what is no recipe.
        UsageError: for a recipe without tape and conversions; when the Trainer is made or begins to train, for an
            optimizer on parameters that the swapped layers have not.
        Unsupported: for a recipe with another rule than backprop, and layers that cannot be swapped.
    """

    recipe: Recipe | Mapping[str, Any] | str | Path
    swapped: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        given = self.recipe
        if isinstance(given, str | Path):
            given = Recipe.read(given)
        self.recipe = given if isinstance(given, Recipe) else Recipe.of(given)
        self._conversions = self.recipe.conversions
        if others := {phase.rule for phase in self.recipe.rules} - {"backprop"}:
            raise Unsupported(
                f"transformers' Trainer finds gradients by loss.backward(), and the recipe has {', '.join(others)}",
                "weft.fit, or rule.step in a loop of your own, on weft.integrations.huggingface.load(...)",
            )
        self._tape = None if self.recipe.tape is None else read_tape(self.recipe.tape)
        if self._tape is None and not self._conversions:
            raise UsageError("the recipe has neither a tape nor conversions; nothing else of it concerns a Trainer")
        self._model: weakref.ref[nn.Module] | None = None
        self._session: Session | None = None
        self._thread = 0

    @property
    def active(self) -> bool:
        """Whether the tape's session is open: inside a training step, or after one that an exception broke off."""
        return self._session is not None

    def close(self) -> None:
        """End the tape's session if it is open."""
        session, self._session = self._session, None
        _OPEN.discard(self)
        if session is not None:
            session.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The Trainer is made and has built no optimizer yet: swap layers."""
        self._convert(given.get("model"), given.get("optimizer"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Swap layers where `on_init_end` has not seen this model; end sessions that a broken step left open."""
        for other in [one for one in _OPEN if one._thread == threading.get_ident()]:
            other.close()
        self._convert(given.get("model"), given.get("optimizer"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Before the first forward pass of an optimizer step."""
        self.close()
        if self._tape is None:
            return
        self._tape.clock = state.global_step << 24
        session = self._tape.on(given["model"])
        session.__enter__()
        self._session, self._thread = session, threading.get_ident()
        _OPEN.add(self)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """After the last backward pass of an optimizer step."""
        self.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """After an optimizer step."""
        self.close()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Before what may be evaluated and saved."""
        self.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """After training."""
        self.close()

    def _convert(self, model: nn.Module | None, optimizer: Any) -> None:
        if model is None or not self._conversions or (self._model is not None and self._model() is model):
            return
        before = {id(p) for p in model.parameters()}
        self.swapped = apply_conversions(model, self._conversions)
        self._model = weakref.ref(model)
        if optimizer is not None:
            _check(model, optimizer, before)


def _check(model: nn.Module, optimizer: Any, before: Iterable[int]) -> None:
    """That an optimizer which is older than the swapped layers still has all that is trained."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    gone = held - {id(p) for p in model.parameters()}
    new = [name for key, name in own.items() if key not in before and key not in held]
    if gone or new:
        listed = f", and lacks {', '.join(new[:3])}{' and others' * (len(new) > 3)}" if new else ""
        raise UsageError(
            f"the optimizer was built before the recipe swapped layers: it holds {len(gone)} parameters that the model "
            f"has no more{listed}. Give the callback to Trainer(callbacks=[...]) and let it build the optimizer; or "
            "call weft.specs.apply_conversions(model, recipe.conversions) before you build it, in model_init too, "
            "and give the callback a recipe with the tape alone"
        )


_OPEN: weakref.WeakSet[_Events] = weakref.WeakSet()  # callbacks whose session is open

if TYPE_CHECKING:

    class WeftCallback(_Events, TrainerCallback):
        pass


def __getattr__(name: str) -> Any:
    if name != "WeftCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = type(
        name, (_Events, transformers_library().TrainerCallback), {"__module__": __name__, "__doc__": _Events.__doc__}
    )
    globals()[name] = made
    return made
