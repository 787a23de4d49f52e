"""Related systems: what their papers say beside what comes out here, as the tables of docs/related-systems.md.

    python bench/neighbours.py                   print all tables
    python bench/neighbours.py --write           write them into the page
    python bench/neighbours.py --check           exit 1 if tables of the page are stale, but for those that take long
    python bench/neighbours.py --check --all     exit 1 if any table is stale

Everything is seeded: a second run gives the same tables. What is measured stands in
neighbours_tiers.py and neighbours_links.py; tests/test_related_systems.py asserts what the page says that holds.
"""

import argparse
import sys
from collections.abc import Callable

from edge_ndp_page import table
from markers import replaced_between
from neighbours_figure import PLAUSIBLE, SHAPE, Figure
from neighbours_links import halo, haq, intra_dp, remoe, squeezellm
from neighbours_tiers import edge_ndp, hybrimoe, monde, trimoe
from pages import ROOT

PAGE = ROOT / "docs/related-systems.md"

SYSTEMS: dict[str, Callable[[], list[Figure]]] = {
    "arXiv 2601.03992": edge_ndp,
    "MoNDE": monde,
    "HybriMoE": hybrimoe,
    "TriMoE": trimoe,
    "HALO": halo,
    "HAQ": haq,
    "SqueezeLLM": squeezellm,
    "Intra-DP": intra_dp,
    "Remoe": remoe,
}
SLOW = ("arXiv 2601.03992", "TriMoE")

# By system: preset policies, preset systems, and what no routing trace can say.
PRESETS = {
    "arXiv 2601.03992": (
        "`edge-ndp`, `edge-ndp-tp`, `edge-ndp-tp-lb`",
        "`edge-ndp`",
        "its number of DIMMs and their arithmetic",
    ),
    "MoNDE": ("`monde`, `monde-ratio`", "`monde-cxl`", "batch and sentences of its averages"),
    "HybriMoE": (
        "`fiddler`, `hybrid`, `ktransformers`, `n-cpu-moe`",
        "`a6000-xeon` and the presets with a CPU",
        "its rule for the cache, which reads gates of experts that were not chosen",
    ),
    "TriMoE": (
        "`trimoe`, `trimoe-no-cpu`, `trimoe-greedy`, `trimoe-static`",
        "`h100-amx-dimm`",
        "rates of its CPU and DIMMs, so no absolute time",
    ),
    "HALO": ("`halo`, `strict`", "`edge-pi-cluster`", "accuracy; which neurons matter; its loss rates"),
    "HAQ": ("`haq`", "any with a CPU", "accuracy; sensitivity; its rules and times"),
    "SqueezeLLM": ("any", "`a6000-xeon`", "accuracy; which weights are sensitive"),
    "Intra-DP": ("`ktransformers`, `hybrid`", "`edge-robot`", "how operators of its networks are cut"),
    "Remoe": ("`remoe`, `all-cpu`, `all-gpu`", "`remoe`", "meaning of prompts; its prices, network and start times"),
    "HALP, EdgeBERT": (
        "any, with `deadline_ms`",
        "any, with `[[gpu.levels]]`",
        "accuracy; entropies, so where a model would exit",
    ),
    "MEMTL": ("your own, learned from exported decisions", "any", "its wireless users, who are not in a trace"),
}
# Held by tests, without a figure of the paper to stand beside.
TESTED = {
    "Remoe": "its equations by hand, the packing of replicas: `tests/engine/test_remote.py`",
    "HALP, EdgeBERT": "energy by level, deadlines: `tests/engine/test_levels.py`, `tests/results/test_deadlines.py`",
    "MEMTL": "regret, from `hot` over a learned dispatch to `optimal`: `tests/engine/test_regret.py`",
}


def slug(system: str) -> str:
    """The name of a system's markers."""
    return "seed" if system.startswith("arXiv") else system.lower()


def figures_table(figures: list[Figure]) -> str:
    """Every figure of a system."""
    rows = []
    for figure in figures:
        held = {True: f"holds ({figure.judged})", False: f"**does not hold** ({figure.judged})", None: "not judged"}
        rows.append([figure.what, figure.paper, figure.here, held[figure.holds], figure.why])
    return table(["figure", "the paper", "here", "check", "why it differs"], rows)


def counted(figures: list[Figure]) -> str:
    """How many figures hold, those with a tolerance and those that are only a direction or a range."""
    parts = []
    for loose, name in ((False, "with a tolerance"), (True, "in direction or range")):
        judged = [f for f in figures if f.holds is not None and f.judged.startswith((SHAPE, PLAUSIBLE)) is loose]
        if judged:
            parts.append(f"{sum(f.holds is True for f in judged)} of {len(judged)} {name}")
    return ", ".join(parts)


def overview(found: dict[str, list[Figure]]) -> str:
    """All systems: what to run, how many figures hold, and what cannot be checked."""
    rows = []
    for system, (policies, systems, unknown) in PRESETS.items():
        rows.append(
            [
                system,
                policies,
                systems,
                "; ".join(filter(None, (counted(found.get(system, [])), TESTED.get(system)))),
                unknown,
            ]
        )
    return table(["system", "policies", "machine", "figures that hold", "cannot be checked"], rows)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = options.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--check", action="store_true")
    options.add_argument("--all", action="store_true", help="with --check: also tables that take long")
    options = options.parse_args()
    some = options.check and not options.all
    found = {system: figures() for system, figures in SYSTEMS.items() if not (some and system in SLOW)}
    parts = {slug(system): figures_table(figures) for system, figures in found.items()}
    if not some:
        parts = {"related": overview(found)} | parts
    page = PAGE.read_text(encoding="utf-8")
    new_page = page
    for name, text in parts.items():
        new_page = replaced_between(new_page, name, text)
    if options.check:
        if new_page != page:
            sys.exit(f"{PAGE.name} stale: run python bench/neighbours.py --write.")
        return
    print(*(f"{name}\n\n{text}" for name, text in parts.items()), sep="\n\n")
    if options.write:
        PAGE.write_text(new_page, encoding="utf-8")
    if broken := [figure.what for figures in found.values() for figure in figures if figure.holds is False]:
        sys.exit(f"Does not hold: {'; '.join(broken)}.")


if __name__ == "__main__":
    main()
