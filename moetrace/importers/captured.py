"""The arguments and results of every importer, for any format."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec import UNSET

from moetrace.spec import Model
from moetrace.spec.errors import UsageError
from moetrace.trace.ranges import Range

# One item of `Capture.parts`: rows of "experts" and of each optional array, by name.
Part = Mapping[str, np.ndarray]
# `recognize` gets at most these first bytes of a file.
FIRST_BYTES = 64 << 10
# Lines and events name any layer, row and expert: a source with fewer than one of them for this many cells of a trace
# (or, of counts, numbers) is not believed.
SPARSEST = 100
MAX_WEIGHT = float(np.finfo(np.float16).max)  # that a trace holds


class ModelLayers(NamedTuple):
    """The layers of the user's model."""

    name: str
    moe: int  # with experts
    numbers: np.ndarray | None  # int64 [moe]: number of each among all; None: not known
    total: int | None  # with and without experts, those of multi-token prediction apart
    mtp: int | None  # of multi-token prediction
    experts: np.ndarray | None = None  # int64 [moe], where layers have numbers of their own


class Hints(NamedTuple):
    """The user's hints about the sources, for formats without this information.

    A source that knows better goes by itself; `import_traces` compares.

    Attributes:
        num_experts: Experts of a layer. By default not known.
        top_k: Experts that a row chooses in a layer. By default not known.
        layers: Number of MoE layers. By default not known.
        scratch: Folder for temporary files. By default the system's own.
        from_model: Names of the above that come from the user's model, not from the user's options.
        reading: A function that gets the number of bytes read of the sources since its last call.
        note: A function that gets a sentence about rows left out, joined or taken for padding.
        strict: Whether a record that can't be used refuses its source. By default it is left out and counted.
        keep_cached: Whether rows that no forward pass computed stay. By default they are left out and counted.
        absent_from: Ids from this one on carry no expert. By default none.
        absent_ids: Further ids that carry no expert.
        columns: For a table, the name of the column of each meaning: "layer", "token", "experts", "gates", "request",
            "step", "phase", "position", "slot", "token_id" and "resident". By default well-known names decide.
        only_layers: Ranges (start, stop) of layers to take, by their numbers in the source, a stop of None for all the
            rest. By default all, except the dense and multi-token-prediction layers that the model names.
        first_layer: Number in the model of the first layer that is taken; the others keep their distance. By default
            the source's own, or the model's where the source numbers its MoE layers only.
        model_layers: The layers of the user's model.
        router: For logits, the rule by which the model chooses: "softmax" or "sigmoid", and after commas "norm",
            "scale=S", "groups=G:M" and "bias=FILE.npy". By default logits are refused.

    Examples:
        >>> import moetrace as mt
        >>> mt.Hints(num_experts=64).of_model(mt.load_model("olmoe-1b-7b")).top_k
        8
    """

    num_experts: int | None = None
    top_k: int | None = None
    layers: int | None = None  # MoE layers
    scratch: Path | None = None  # folder for temporary files; None: the system's own
    from_model: tuple[str, ...] = ()  # those of the above that come from the user's model and not from an option
    reading: Callable[[int], object] = lambda _: None  # is called with the number of source bytes that were read
    note: Callable[[str], object] = lambda _: None
    strict: bool = False
    keep_cached: bool = False
    absent_from: int | None = None
    absent_ids: tuple[int, ...] = ()
    columns: Mapping[str, str] | None = None  # of a table: meaning -> name
    only_layers: Sequence[Range] | None = None
    first_layer: int | None = None
    model_layers: ModelLayers | None = None
    router: str | None = None

    def need(self, what: str, source: Path) -> int:
        """The hint of a name, which the source at hand does not know.

        Args:
            what: "num_experts", "top_k" or "layers".
            source: The file, for the message.

        Returns:
            The number.

        Raises:
            UsageError: It is unknown. The message says how to give it.
        """
        value = getattr(self, what)
        if value is None:
            option = {"num_experts": "--model or --experts", "top_k": "--model or --top-k", "layers": "--model"}[what]
            raise UsageError(f"{source} does not say {what}: give {option}.")
        return int(value)

    def of_model(self, model: Model) -> "Hints":
        """These hints, and the sizes of a model where the user gives no sizes.

        Args:
            model: The model.

        Returns:
            The hints.
        """
        sizes = {"num_experts": model.most_experts, "top_k": model.most_top_k}
        sizes = {name: size for name, size in sizes.items() if getattr(self, name) is None}
        mtp = None if model.mtp_layers is UNSET else model.mtp_layers
        experts = None if isinstance(model.experts, int) else model.layer_experts
        layers = ModelLayers(model.name, model.moe_layers, model.layer_index, model.all_layers, mtp, experts)
        return self._replace(**sizes, layers=model.moe_layers, from_model=tuple(sizes), model_layers=layers)


class Capture(NamedTuple):
    """Rows in time order, from one source or several (ranks), and their routing, part by part."""

    model: str  # as the source calls it; "" if it does not
    num_experts: int
    top_k: int
    layer_index: np.ndarray  # uint16 [layers]
    expert_bytes: np.ndarray | None  # int64 [layers] or [layers, experts]
    request: np.ndarray  # integers [rows], any numbering
    position: np.ndarray  # integers [rows]
    phase: np.ndarray  # uint8 [rows]: 0 prefill, 1 decode
    optional: tuple[str, ...]  # of "gates", "token", "recorded"
    facts: dict[str, Any]  # for the trace's `source`: engine, quantization, licence, ...; no path, no clock time
    parts: Callable[[], Iterator[Part]]
    sources: tuple[Path, ...] = ()
    step_rows: np.ndarray | None = None  # int64 [steps], if the source knows its forward passes
    layer_experts: np.ndarray | None = None  # uint16 [layers], where layers have numbers of their own


class Counts(NamedTuple):
    """Only counts: how often each expert was chosen in each step."""

    model: str
    num_experts: int
    top_k: int
    layer_index: np.ndarray  # uint16 [layers]
    rows: np.ndarray  # int64 [steps], token rows of each step, 1 or more
    phase: np.ndarray  # uint8 [steps]: 0 prefill, 1 decode, 2 mixed or unknown
    facts: dict[str, Any]
    parts: Callable[[], Iterator[np.ndarray]]  # int64 [some steps, layers, experts]
    sources: tuple[Path, ...] = ()
    layer_experts: np.ndarray | None = None  # uint16 [layers], where layers have numbers of their own


def rows_of_counts(counts: np.ndarray, top_k: int) -> np.ndarray:
    """The least rows int64 [steps] that explain `counts` [steps, layers, experts]: no layer or expert has more."""
    return np.maximum(-(-counts.sum(axis=2, dtype=np.int64).max(axis=1) // top_k), counts.max(axis=(1, 2)))


def without_zero_cells(experts: np.ndarray, absent: int) -> np.ndarray:
    """Turn cells of [rows, layers, top_k > 1] that are all zero, as engines leave dense layers, into absent ones."""
    if experts.shape[-1] > 1:
        some = experts[..., 0].copy()
        for slot in range(1, experts.shape[-1]):  # a quarter of the time of `any` over a short last axis
            some |= experts[..., slot]
        if not some.all():
            experts[some == 0] = absent
    return experts
