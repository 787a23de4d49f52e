"""Select the layers of a source, and give each its number in the model.

Engines number layers in three ways: all of them, dense ones included; the MoE layers only; and either with the layers
of multi-token prediction (MTP) after the last. The user's model distinguishes them. Layers that are left out or
renumbered are listed in `source` and in a note.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from moetrace.importers.captured import Capture, Counts, Hints, ModelLayers, Part
from moetrace.spec.errors import UsageError, counted
from moetrace.trace.ranges import named_layers
from moetrace.trace.schema import MAX_LAYERS, PER_CHOICE

_TOLD = 12  # numbers of layers in a sentence


def kept_layers(used: np.ndarray, hints: Hints) -> tuple[np.ndarray, dict[str, Any]]:
    """Indices of the planes to keep, of `used` (bool [planes]: some token chose an expert there), and what to say.

    All are kept, unless the model has fewer layers with experts and exactly these are used: then the rest is dense.
    Planes of MTP layers stay, for `numbered` to leave out. Where the user says which layers to take, all stay.
    """
    model, found = hints.model_layers, np.flatnonzero(used)
    if hints.layers in (None, used.size) or hints.only_layers is not None:
        return np.arange(used.size), {}
    mtp = (model.mtp or 0) if model else 0
    if (
        model
        and model.numbers is not None
        and model.total is not None
        and used.size in (model.total, model.total + mtp)
    ):
        # A layer with experts that nobody chose is no dense layer.
        expected = np.r_[model.numbers, found[found >= model.total]]
        kept = expected if np.isin(found, expected).all() else np.arange(used.size)
    else:
        kept = found if found.size in (hints.layers, hints.layers + mtp) else np.arange(used.size)
    gone = np.setdiff1d(np.arange(used.size), kept)
    return kept, {"dense_layers_dropped": gone.tolist()} if gone.size else {}


def numbered(capture: Capture | Counts, hints: Hints, whole: bool) -> Capture | Counts:
    """The capture with the layers that are wanted, numbered as in the model.

    It is to be the `whole` model, or to lose layers later. Raises UsageError if the user names layers that there are
    not, or if it is not the whole.
    """
    model, index = hints.model_layers, capture.layer_index.astype(np.int64)
    wished = hints.only_layers is not None or hints.first_layer is not None
    if not wished and (model is None or not whole):
        return capture
    where = str(capture.sources[0])
    numbers = index if model is None else _in_model(index, model)
    facts: dict[str, Any] = {}
    if hints.only_layers is not None:
        kept = named_layers(where, index, hints.only_layers)
        facts |= told_taken(where, index[kept], index, hints)
    else:
        kept = ~_of_mtp(capture, numbers, model) if model else np.ones(index.size, bool)
        facts |= told_mtp(where, index[~kept], hints)
    numbers = numbers[kept]
    if hints.first_layer is not None:
        numbers = numbers + (hints.first_layer - numbers[0])
        if numbers[-1] >= MAX_LAYERS:
            raise UsageError(
                f"{where}: the last layer would have the number {numbers[-1]}; {MAX_LAYERS - 1} is the last."
            )
    if not np.array_equal(numbers, index[kept]):
        facts["layer_numbers"] = f"{shown(index[kept])} in the source, {shown(numbers)} in the model"
        why = "" if hints.first_layer is not None else ": if they are others, say --first-layer N"
        hints.note(f"{where}: source {_layers(index[kept])} is {_layers(numbers)} of the model{why}.")
    if model:
        _check(capture, numbers, model, whole and not wished, hints)
        capture = _with_experts(capture, numbers, model, kept)
    return _with_layers(capture, kept, numbers, facts)


def _with_experts(
    capture: Capture | Counts, numbers: np.ndarray, model: ModelLayers, kept: np.ndarray
) -> Capture | Counts:
    """The capture with the model's experts of each layer, unless the source says them; by number, else by order."""
    if model.experts is None or capture.layer_experts is not None:
        return capture
    own = np.full(kept.size, capture.num_experts)
    if model.numbers is not None and np.isin(numbers, model.numbers).all():
        own[kept] = model.experts[np.searchsorted(model.numbers, numbers)]
    elif numbers.size == model.moe:
        own[kept] = model.experts
    else:
        return capture
    return capture._replace(layer_experts=own)


def told_mtp(where: str, gone: np.ndarray, hints: Hints) -> dict[str, Any]:
    """The entry in `source` for left-out MTP layers, numbered `gone` [n], also given as a note."""
    if not gone.size:
        return {}
    is_one = "is one" if gone.size == 1 else "are some"
    hints.note(
        f"{where}: left out {_layers(gone)}, which {is_one} of multi-token prediction (MTP): say --layers to take "
        f"others."
    )
    return {"left_out_mtp_layers": gone.tolist()}


def told_taken(where: str, taken: np.ndarray, index: np.ndarray, hints: Hints) -> dict[str, Any]:
    """The entry in `source` for the user's selection from the layers that the source numbers `index`, also a note."""
    if taken.size == index.size:
        return {}
    hints.note(f"{where}: took {_layers(taken)} of {shown(index)}.")
    return {"layers_taken": f"{shown(taken)} of {shown(index)}"}


def _layers(numbers: np.ndarray) -> str:
    return f"layer{'s' * (numbers.size > 1)} {shown(numbers)}"


def shown(numbers: np.ndarray) -> str:
    """Numbers of layers in increasing order, in few words."""
    if numbers.size > 2 and numbers[-1] - numbers[0] == numbers.size - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    if numbers.size > _TOLD:
        return f"{', '.join(map(str, numbers[: _TOLD - 2].tolist()))}, ..., {numbers[-1]}"
    return ", ".join(map(str, numbers.tolist()))


def _in_model(index: np.ndarray, model: ModelLayers) -> np.ndarray:
    """Numbers int64 [layers] in the model of layers that the source numbers `index`: the same, unless that can't be.

    It can't if the number of layers is that of the model's MoE layers (and MTP layers), consecutive, with another first
    layer.
    """
    if model.numbers is None or model.total is None or np.isin(index, model.numbers).all():
        return index
    more = index.size - model.moe
    if more < 0 or more not in (0, model.mtp):
        return index
    # Planes 0 to 45 of a model whose layer 0 is dense are those of its MoE layers 1 to 45 and of MTP.
    if np.isin(model.numbers, index).all() and index[~np.isin(index, model.numbers)].min() >= model.total:
        return index
    moe = index[: model.moe]
    row = np.array_equal(moe - moe[0], np.arange(model.moe))
    if not row and not np.array_equal(moe - moe[0], model.numbers - model.numbers[0]):
        return index
    return np.r_[model.numbers, model.total + np.arange(more)]


def _of_mtp(capture: Capture | Counts, numbers: np.ndarray, model: ModelLayers) -> np.ndarray:
    """bool [layers]: those after the model's last layer, unless the model has fewer."""
    more = numbers.size - model.moe
    last = np.arange(numbers.size) >= model.moe
    if more <= 0 or more > (more if model.mtp is None else model.mtp):
        return np.zeros(numbers.size, bool)
    if model.numbers is not None and model.total is not None:
        return (numbers >= model.total) & last if np.array_equal(numbers[~last], model.numbers) else np.zeros_like(last)
    sure = model.mtp == more if model.mtp is not None else _counts_differ(capture, model.moe)
    return last & sure


def _counts_differ(capture: Capture | Counts, layers: int) -> bool:
    """Whether the first `layers` all count the same number of choices, and the others differ: they saw other tokens."""
    if not isinstance(capture, Counts):
        return False
    total = np.sum([part.sum(axis=(0, 2), dtype=np.int64) for part in capture.parts()], axis=0)
    return bool((total[:layers] == total[0]).all() and (total[layers:] != total[0]).all())


def _check(capture: Capture | Counts, numbers: np.ndarray, model: ModelLayers, whole: bool, hints: Hints) -> None:
    where = str(capture.sources[0])
    if whole and numbers.size != model.moe:
        raise UsageError(
            f"{where} has {numbers.size} MoE layers of {capture.num_experts} experts, but the model {model.name} has "
            f"{model.moe} of {hints.num_experts}: name the right one with --model, or say with --layers which of the "
            f"layers {shown(numbers)} to take, and with --first-layer which number the first of them has."
        )
    if numbers.size != model.moe and not whole and (hints.only_layers or hints.first_layer is not None):
        hints.note(
            f"{where}: the trace has {counted(numbers.size, 'MoE layer')}, and {model.name} has {model.moe}: a "
            f"replay needs --set model.moe_layers={numbers.size}."
        )
    if model.numbers is None or model.total is None:
        return
    odd = numbers[~np.isin(numbers, model.numbers) & (numbers < model.total)]
    if odd.size and (whole or hints.only_layers is not None or hints.first_layer is not None):
        hints.note(
            f"{where}: {counted(odd.size, 'layer')} of the trace ({shown(odd)}) would have no experts in {model.name}, "
            f"whose MoE layers are {shown(model.numbers)}: check --model, or say --first-layer N."
        )


def _with_layers(
    capture: Capture | Counts, kept: np.ndarray, numbers: np.ndarray, facts: dict[str, Any]
) -> Capture | Counts:
    """The capture with the layers that are true in bool [layers], which get these numbers."""
    own = None if capture.layer_experts is None else capture.layer_experts[kept]
    capture = capture._replace(layer_index=numbers.astype(np.uint16), facts=capture.facts | facts, layer_experts=own)
    if kept.all():
        return capture
    places = np.flatnonzero(kept)
    row = places[-1] - places[0] == places.size - 1
    taken = slice(int(places[0]), int(places[-1]) + 1) if row else places  # a slice copies nothing
    if isinstance(capture, Counts):
        whole_counts = capture.parts

        def counts() -> Iterator[np.ndarray]:
            return (part[:, taken] for part in whole_counts())

        return capture._replace(parts=counts)
    whole_rows = capture.parts

    def rows() -> Iterator[Part]:
        return (
            {name: array[:, taken] if name in PER_CHOICE else array for name, array in part.items()}
            for part in whole_rows()
        )

    sizes = None if capture.expert_bytes is None else capture.expert_bytes[kept]
    return capture._replace(parts=rows, expert_bytes=sizes)
