"""The meaning of a table's columns: as the user names them, or as well-known tables do."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from moetrace.spec.errors import UsageError, printable

MEANINGS = (
    "layer",
    "token",
    "experts",
    "gates",
    "request",
    "step",
    "phase",
    "position",
    "slot",
    "token_id",
    "resident",
)
# Names of ours and of engines' exports; of a meaning, the first that a table has. `token` is what numbers tokens, and
# not the id of a word.
_KNOWN = {
    "experts": (
        "experts",
        "expert",
        "expert_ids",
        "expert_id",
        "topk_ids",
        "topk_indices",
        "top_k_ids",
        "selected_experts",
        "indices",
        "router_indices",
    ),
    "layer": ("layer", "layer_id", "layer_idx", "layer_index", "moe_layer"),
    "token": ("row", "token_idx", "token_index", "token_pos", "tok", "token"),
    "gates": ("gates", "gate", "gate_weights", "topk_weights", "router_weights", "weights", "weight", "scores"),
    "request": ("request", "request_id", "req_id", "seq_id", "sequence_id", "prompt_id"),
    "step": ("step", "forward_pass", "forward_pass_id", "iteration"),
    "phase": ("phase",),
    "position": ("position", "pos", "token_position"),
    "slot": ("slot",),  # `rank` is often of a process, `k` the length of a list
    "token_id": ("token_id",),
    "resident": ("resident",),
}
_COUNTS = {"count", "counts", "hits", "frequency"}
OWN_COLUMNS = {"step", "row", "request", "position", "phase", "layer", "slot", "expert"}  # docs/export.md
# Other names of columns in some exports: tables that have all of the first names mean the pairs.
_EXPORTS: tuple[tuple[set[str], dict[str, str]], ...] = (
    (OWN_COLUMNS, {"token": "row", "token_id": "token"}),
    # As BigMoeOnEdge's route traces, without their first lines.
    (
        {"turn", "phase", "step", "layer", "slot", "expert"},
        {"request": "turn", "token": "step", "position": "step", "step": "", "resident": "residency"},
    ),
    # MoE-Beyond's prompt_N_data.csv (ngavhane/moe-beyond, commits 4622f6de and 774a2e60): a prompt a file, tokens
    # in order; "Token" is a text.
    (
        {"Layer ID", "Batch Number", "Token", "Activated Expert IDs"},
        {"layer": "Layer ID", "experts": "Activated Expert IDs", "request": "Batch Number"},
    ),
)
Columns = Mapping[str, Sequence[str]]
_LAYER = re.compile(r"(?:layers?|block|blk)[ ._-]?(\d{1,5})(?!\d)", re.ASCII | re.IGNORECASE)


def said_columns(text: str) -> dict[str, str]:
    """The columns of `--columns layer=L,experts=E`, by meaning. Raises UsageError."""
    said: dict[str, str] = {}
    for part in text.split(","):
        meaning, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals or not name:
            raise UsageError(f"--columns has {part!r}, but wants pairs such as layer=COLUMN,experts=COLUMN.")
        if meaning not in MEANINGS:
            raise UsageError(f"--columns knows no {meaning!r}, only {', '.join(MEANINGS)}.")
        if meaning in said:
            raise UsageError(f"--columns says {meaning} twice.")
        said[meaning] = name
    return said


def named_columns(path: Path, names: Sequence[str], said: Mapping[str, str]) -> dict[str, list[str]]:
    """The columns of each meaning that the user names: several for `a+b` or `a*`, of experts and gates.

    Raises UsageError if the table has no such column.
    """
    found: dict[str, list[str]] = {}
    for meaning, text in said.items():
        many = meaning in ("experts", "gates")
        parts = [text] if text in names or not many else text.split("+")
        columns = [name for part in parts for name in _matching(part, names, many)]
        if not columns:
            raise UsageError(f"{path} has no column {text!r} for {meaning}; it has {shown_names(names)}.")
        found[meaning] = columns
    if "experts" not in found:
        raise UsageError("--columns must say which column holds the experts: experts=COLUMN.")
    return found


def known_columns(names: Sequence[str]) -> dict[str, list[str]] | None:
    """The columns of each meaning, by their names; None if experts are not among them."""
    if len(set(names)) < len(names):
        return None
    found = {meaning: next((name for name in known if name in names), "") for meaning, known in _KNOWN.items()}
    for needed, other in _EXPORTS:
        if needed <= set(names):
            found |= {meaning: name if name in names else "" for meaning, name in other.items()}
            break
    if scores := _score_columns(names):
        return {"layer": ["layer_id"], "token": ["token_id"], "scores": scores}
    if not found["experts"]:
        return None
    return {meaning: [name] for meaning, name in found.items() if name}


def shown_names(names: Sequence[str]) -> str:
    """The first names, fit for a sentence."""
    return ", ".join(printable(name[:40]) for name in names[:20]) + (", …" if len(names) > 20 else "")


def without_ids(names: Sequence[str]) -> str:
    """What to do with a table that has counts, or gates but no ids of experts, as the end of a sentence."""
    if set(names) & _COUNTS and not any("token" in name for name in names):
        return "; if it counts how often each expert was chosen, call the columns layer_id,expert_id,count"
    if not set(names) & set(_KNOWN["gates"]) or set(names) & set(_KNOWN["experts"]):
        return ""
    return (
        "; gates do not name the chosen experts: save the router's outputs for all experts as floats "
        "[tokens, layers, experts] in a .npy file, and give --router and --top-k"
    )


def _score_columns(names: Sequence[str]) -> list[str]:
    """The columns of scores, expert_0 and so on, of DynaNDE's tables of FLAME-MoE's routing.

    As in Akash-N-Pai/DynaNDE-Simulator, commits 28b35d88 and ed75f962: a row is a token in a layer, 0 is not chosen.
    """
    if list(names[:2]) != ["layer_id", "token_id"] or len(names) < 4:
        return []
    wanted = [f"expert_{number}" for number in range(len(names) - 2)]
    return wanted if list(names[2:]) == wanted else []


def says_layer(name: str) -> int | None:
    """The layer that a name says with the word `layer` and a number."""
    found = _LAYER.findall(name)
    return int(found[-1]) if found else None


def layer_of_name(name: str) -> int | None:
    """The layer that a name says (`layer12`, `moe_3`): the number after the word `layer`, else its last number."""
    numbers = re.findall(r"\d+", name)
    if (said := says_layer(name)) is not None:
        return said
    return int(numbers[-1]) if numbers and len(numbers[-1]) < 6 else None


def _matching(part: str, names: Sequence[str], many: bool) -> list[str]:
    if part in names:
        return [part]
    if not many or "*" not in part:
        return []
    found = [name for name in names if fnmatchcase(name, part)]
    return sorted(found, key=lambda name: [int(text) if text.isdigit() else text for text in re.split(r"(\d+)", name)])
