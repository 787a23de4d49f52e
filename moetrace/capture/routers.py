"""Find the routers of a Hugging Face MoE model, and record what they choose while the model runs.

Since release 5 of Transformers, nearly every router returns (logits [rows, experts], weights [rows, k], ids [rows, k]).
The shapes are checked all the same: a class that returns something else is refused by name.
"""

import importlib
import itertools
import re
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import check_ids, expert_dtype

# The rule is that a router's class is called ...TopKRouter. These are routers as well.
ALSO_ROUTERS = (
    "AfmoeTokenChoiceRouter",
    "DeepseekV4HashRouter",
    "Gemma4TextRouter",
    "HunYuanMoEV1Gate",
    "Llama4Router",  # other tensors, see _llama4
)
_ROUTER_LIKE = re.compile(r"(router|gate|gating)$", re.IGNORECASE)
_FLOAT16_MAX = float(np.finfo(np.float16).max)


class Router(NamedTuple):
    """A router of a model: where it is, and how many experts it chooses from."""

    stack: str  # module path of the list of layers
    layer: int  # absolute index in that list
    path: str
    module: Any
    num_experts: int
    top_k: int

    @property
    def shown(self) -> str:
        """Class and path, for errors."""
        return f"{type(self.module).__name__} ({self.path})"


class RouterChoices(NamedTuple):
    """The routers' choices for some rows; both arrays are [rows, layers, top_k]."""

    experts: np.ndarray  # uint8 or uint16
    gates: np.ndarray  # float16


def find_routers(model: Any) -> list[Router]:
    """The router of each MoE layer of a PyTorch model, by layer.

    Args:
        model: A `torch.nn.Module`.

    Returns:
        A router for each MoE layer; all have equally many experts and the same top_k.

    Raises:
        MoetraceError: A layer has experts but no router that is known, routers differ in size, or the model has no MoE
            layers. The message names the class.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    routers = [_router(path, module) for path, module in modules.items() if _is_router(type(module).__name__)]
    shown = type(model).__name__
    _check_known(shown, modules, {(router.stack, router.layer) for router in routers})
    if not routers:
        raise MoetraceError(f"{shown} has no MoE layers: no module in it is a router, or holds experts.")
    first = routers[0]
    for router in routers[1:]:
        if router.stack != first.stack:
            raise MoetraceError(f"{shown} has routers in two stacks of layers, {first.stack} and {router.stack}.")
        if (router.num_experts, router.top_k) != (first.num_experts, first.top_k):
            raise MoetraceError(
                f"{shown}: {router.shown} chooses {router.top_k} of {router.num_experts} experts, but {first.shown} "
                f"{first.top_k} of {first.num_experts}; a trace needs layers of one size."
            )
    routers.sort(key=lambda router: router.layer)
    for router, after in itertools.pairwise(routers):
        if router.layer == after.layer:
            raise MoetraceError(f"{shown} has two routers in layer {router.layer}: {router.shown} and {after.shown}.")
    return routers


class Recorder:
    """A context manager that records the choices of `routers` while it is open, and leaves the model as it was.

    Its forward hooks return None, so the output of the model stays the same to the bit.
    """

    def __init__(self, routers: list[Router]) -> None:
        self._routers = routers
        self._hooks: list[Any] = []
        self._said: dict[int, tuple[Any, Any]] = {}  # layer -> ids and weights, of the pass under way

    def __enter__(self) -> Self:
        try:
            for router in self._routers:
                self._hooks.append(router.module.register_forward_hook(self._hook(router)))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()

    def take(self, rows: int, keep: np.ndarray | None = None) -> RouterChoices:
        """The choices of the one pass that the model made since the last `take`.

        Args:
            rows: Rows of the pass.
            keep: bool [rows]; the rows to return, without padding. By default all.

        Returns:
            Experts and gates, both [kept rows, layers, top_k].

        Raises:
            MoetraceError: A router did not run for just these rows, or chose an impossible id.
        """
        said, self._said = self._said, {}
        for router in self._routers:
            if router.layer not in said:
                raise MoetraceError(f"{router.shown} did not run, though the model did.")
            if len(said[router.layer][0]) != rows:
                raise MoetraceError(f"{router.shown} chose for {len(said[router.layer][0])} rows, not {rows}.")
        parts = [[tensor.cpu().numpy() for tensor in said[router.layer]] for router in self._routers]
        experts, gates = (np.stack(arrays, axis=1) for arrays in zip(*parts, strict=True))
        if keep is not None:
            experts, gates = experts[keep], gates[keep]
        return RouterChoices(self._checked_ids(experts), self._checked_gates(gates))

    def _hook(self, router: Router) -> Callable[[Any, Any, Any], None]:
        def record(module: Any, inputs: Any, output: Any) -> None:  # what is not None would replace the output
            ids, weights = _choices(router, output)
            if router.layer in self._said:
                raise MoetraceError(f"{router.shown} ran twice in one pass, so its choices belong to no one layer.")
            # Copies, in dtypes that hold any id and weight: the model may go on to change its tensors in place.
            torch = import_torch()
            self._said[router.layer] = (
                ids.detach().to(torch.int32, copy=True),
                weights.detach().to(torch.float32, copy=True),
            )

        return record

    def _checked_ids(self, ids: np.ndarray) -> np.ndarray:
        num_experts = self._routers[0].num_experts
        wrong = (ids < 0) | (ids >= num_experts)  # before they are narrowed: 255 would say absent
        if wrong.any():
            row, entry, slot = (int(i) for i in np.argwhere(wrong)[0])
            raise MoetraceError(
                f"{self._routers[entry].shown} chose expert {ids[row, entry, slot]}, but there are {num_experts}."
            )
        experts = ids.astype(expert_dtype(num_experts))
        check_ids(type(self._routers[0].module).__name__, 0, experts, num_experts)
        return experts

    def _checked_gates(self, gates: np.ndarray) -> np.ndarray:
        wrong = ~(np.abs(gates) <= _FLOAT16_MAX)  # NaN as well
        if wrong.any():
            row, entry, slot = (int(i) for i in np.argwhere(wrong)[0])
            raise MoetraceError(
                f"{self._routers[entry].shown} gave an expert the weight {gates[row, entry, slot]}, which a trace "
                f"(float16) does not hold."
            )
        return gates.astype(np.float16)

    def _remove(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._said = {}


def import_torch() -> Any:
    """The module torch, which is installed if there is a model."""
    return importlib.import_module("torch")


def _is_router(name: str) -> bool:
    return name.lower().endswith("topkrouter") or name in ALSO_ROUTERS


def _router(path: str, module: Any) -> Router:
    name = type(module).__name__
    place = _place(path)
    if place is None or sum(part.isdigit() for part in path.split(".")) != 1:
        raise MoetraceError(f"{name} ({path}) is not in one numbered layer, so its layer is not known.")
    settings = getattr(module, "config", None)  # of those that don't keep the numbers themselves
    num_experts = getattr(module, "num_experts", getattr(settings, "num_experts", None))
    top_k = getattr(module, "top_k", getattr(settings, "top_k_experts", None))
    if not isinstance(num_experts, int) or not isinstance(top_k, int):
        raise MoetraceError(f"{name} ({path}) does not say num_experts and top_k, so it can't be captured.")
    return Router(*place, path, module, num_experts, top_k)


def _place(path: str) -> tuple[str, int] | None:
    """The path of the list of layers and the number in it: ("model.layers", 3) of "model.layers.3.mlp.gate"."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:index]), int(part)
    return None


def _check_known(shown: str, modules: dict[str, Any], places: set[tuple[str, int]]) -> None:
    """Raise if a layer has experts, but none of the routers that were found."""
    for path, module in modules.items():
        if path.rpartition(".")[2] != "experts" and "Experts" not in type(module).__name__:
            continue
        place = _place(path)
        if place is None or place in places:
            continue
        layer = ".".join((place[0], str(place[1])))
        suspects = [
            f"{type(other).__name__} ({name})"
            for name, other in modules.items()
            if name.startswith(f"{layer}.")
            and (_ROUTER_LIKE.search(type(other).__name__) or name.rpartition(".")[2] in ("router", "gate"))
        ]
        block = path.rpartition(".")[0]
        who = suspects[0] if suspects else f"{type(modules.get(block, module)).__name__} ({block})"
        raise MoetraceError(
            f"{shown} routes with {who}, which capture does not know; it knows classes called ...TopKRouter, and "
            f"{', '.join(ALSO_ROUTERS)}."
        )


def _choices(router: Router, output: Any) -> tuple[Any, Any]:
    """Ids and weights, each [rows, top_k], of what a router returned; raise if it is not what the class should."""
    if type(router.module).__name__ == "Llama4Router":
        output = _llama4(router, output)
    if not isinstance(output, tuple) or len(output) != 3:
        got = f"{len(output)} values" if isinstance(output, tuple) else f"a {type(output).__name__}"
        raise MoetraceError(f"{router.shown} returned {got}, not (logits, weights, ids), so it can't be captured.")
    logits, weights, ids = output
    shapes = [tuple(getattr(tensor, "shape", ())) for tensor in output]
    rows = shapes[0][:1]
    if shapes != [(*rows, router.num_experts), (*rows, router.top_k), (*rows, router.top_k)] or not rows:
        raise MoetraceError(
            f"{router.shown} returned the shapes {', '.join(map(str, shapes))}, not logits [rows, "
            f"{router.num_experts}] and weights and ids [rows, {router.top_k}]."
        )
    if not logits.is_floating_point() or not weights.is_floating_point() or not str(ids.dtype).startswith("torch.int"):
        raise MoetraceError(f"{router.shown} returned ids as {ids.dtype}, not (logits, weights, ids).")
    return ids, weights


def _llama4(router: Router, output: Any) -> tuple[Any, Any, Any]:
    """(scores of all experts, logits), as Llama 4 returns it, in the common form.

    The same top-k of the same logits as in the router, so the ids are its own, ties included.
    """
    if not isinstance(output, tuple) or len(output) != 2:
        raise MoetraceError(f"{router.shown} returned something other than (scores, logits), so it can't be captured.")
    scores, logits = output
    ids = logits.topk(router.top_k, dim=1).indices
    return logits, scores.gather(1, ids), ids
