"""Learn a dispatch from exported decisions, and replay it on requests that it did not see.

    python -m pip install scikit-learn
    python bench/learned_dispatch.py [-o learned.py] [--write]

A decision tree learns from the first half of a trace's requests on which device `optimal` runs an expert, and becomes
a file of plain if and else that any replay takes as `learned.py:learned`. The table of regret is of the second half;
`--write` puts it, and the file's first lines, into docs/how-to/learn-a-dispatch.md.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from markers import write_between
from pages import ROOT

import moetrace as mt
from moetrace.spec import PolicySpec

PAGE = ROOT / "docs/how-to/learn-a-dispatch.md"
TRACE = ROOT / "traces/tiny-olmoe.h5"
SYSTEM, SLOTS, DEPTH, LEAST = "edge-ndp", 48, 8, 40
# Inputs of the tree for each expert. Seconds are shares of the busiest unit's time if all ran at home.
FEATURES = ("resident", "on_gpu_s", "at_home_s", "gpu_so_far_s", "unit_left_s", "others_left_s")


class Split(NamedTuple):
    """A question of a tree: is the feature at most the threshold? Leaves are True (the GPU) or False (home)."""

    feature: str
    threshold: float
    yes: "Split | bool"
    no: "Split | bool"


def features(decisions: pl.DataFrame) -> pl.DataFrame:
    """Return what a tree learns from: `FEATURES` of each decision, and `on_gpu`, where `optimal` runs the expert.

    Residents are decided first, both parts in demand order; each decision knows those before it.
    """
    layer, unit = ("step", "layer"), ("step", "layer", "group")
    own_s, home_s, on_gpu = pl.col("gpu_s") + pl.col("fetch_s"), pl.col("ndp_s"), pl.col("optimal") == "gpu"
    taken_s, sent_s = pl.when(on_gpu).then(home_s).otherwise(0.0), pl.when(on_gpu).then(own_s).otherwise(0.0)
    searched = decisions.filter(pl.col("optimal").is_not_null())
    in_turn = searched.sort("step", "layer", "resident", descending=[False, False, True], maintain_order=True)
    busiest_s = home_s.sum().over(unit).max().over(layer)
    unit_left_s = home_s.sum().over(unit) - (taken_s.cum_sum().over(unit) - taken_s)
    all_left_s = home_s.sum().over(layer) - (taken_s.cum_sum().over(layer) - taken_s)
    return in_turn.select(
        pl.col("resident").cast(pl.Float64),
        on_gpu_s=own_s / busiest_s,
        at_home_s=home_s / busiest_s,
        gpu_so_far_s=(sent_s.cum_sum().over(layer) - sent_s) / busiest_s,
        unit_left_s=unit_left_s / busiest_s,
        others_left_s=(all_left_s - unit_left_s) / busiest_s,
        on_gpu=on_gpu,
    )


def learn(decisions: pl.DataFrame) -> Split | bool:
    """Fit a decision tree of scikit-learn to decisions; an error costs what the expert's place costs at home."""
    from sklearn.tree import DecisionTreeClassifier

    table = features(decisions)
    tree = DecisionTreeClassifier(max_depth=DEPTH, min_samples_leaf=LEAST, random_state=0)
    tree.fit(table.select(FEATURES).to_numpy(), table["on_gpu"].to_numpy(), sample_weight=table["at_home_s"].to_numpy())
    return _node(tree.tree_, [bool(one) for one in tree.classes_], 0)


def _node(tree: Any, classes: list[bool], at: int) -> Split | bool:
    left, right = int(tree.children_left[at]), int(tree.children_right[at])
    if left < 0:
        return classes[int(tree.value[at][0].argmax())]
    yes, no = _node(tree, classes, left), _node(tree, classes, right)
    if isinstance(yes, bool) and yes is no:
        return yes
    return Split(FEATURES[tree.feature[at]], float(tree.threshold[at]), yes, no)


def source(tree: Split | bool) -> str:
    """Return a Python file with the tree as a dispatch: no import but moetrace, so that it runs where it is."""
    tree_lines = "\n".join(_lines(tree, 12 * " "))
    return f"{_HEAD}{tree_lines}\n{_TAIL}"


_HEAD = '''"""A dispatch that was learned from the decisions of `optimal` (bench/learned_dispatch.py)."""

import moetrace as mt


@mt.policy
def learned(state, view, layer, load, plan):
    """Run an expert where a decision tree says; seconds are shares of the busiest unit's with all at home."""
    for g in range(view.groups.size):
        view.groups[g].busy_s = 0.0
    busiest_s, all_left_s, sent_s = 0.0, 0.0, 0.0
    for i in range(load.size):
        unit = view.groups[view.active[i].group]
        unit.busy_s += view.active[i].ndp_s
        all_left_s += view.active[i].ndp_s
        busiest_s = max(busiest_s, unit.busy_s)
    for resident in (1, 0):
        for i in range(load.size):
            expert = view.active[i]
            if expert.resident != resident:
                continue
            unit, own_s = view.groups[expert.group], expert.gpu_s + expert.fetch_s
            on_gpu_s, at_home_s, gpu_so_far_s = own_s / busiest_s, expert.ndp_s / busiest_s, sent_s / busiest_s
            unit_left_s, others_left_s = unit.busy_s / busiest_s, (all_left_s - unit.busy_s) / busiest_s
'''
_TAIL = """            if plan[i] == 1:
                sent_s += own_s
                unit.busy_s -= expert.ndp_s
                all_left_s -= expert.ndp_s
"""


def _lines(tree: Split | bool, indent: str) -> list[str]:
    if isinstance(tree, bool):
        return [f"{indent}plan[i] = {int(tree)}"]
    yes, no = _lines(tree.yes, indent + "    "), _lines(tree.no, indent + "    ")
    return [f"{indent}if {tree.feature} <= {tree.threshold!r}:", *yes, f"{indent}else:", *no]


def policy(name: str, dispatch: str) -> PolicySpec:
    """Return a policy that differs from the others in its dispatch only; `hot` has no residency but none."""
    residency = "none" if dispatch == "hot" else "lru"
    return PolicySpec(name=name, placement="ep", dispatch=dispatch, residency=residency)


def halves(trace: str | Path, folder: Path) -> tuple[Path, Path]:
    """Write the first and the second half of a trace's requests into files."""
    with mt.Trace.open(trace) as whole:
        ids = sorted({int(one) for one in whole.read("request", 0, whole.rows)})
    middle, parts = ids[len(ids) // 2], (folder / "first.h5", folder / "second.h5")
    mt.select(trace, parts[0], requests=[(ids[0], middle)])
    mt.select(trace, parts[1], requests=[(middle, None)])
    return parts


def decisions_of(trace: str | Path) -> pl.DataFrame:
    """Return what there is to learn: the decisions of `balance`, each beside that of `optimal`."""
    options: dict[str, Any] = {"system": SYSTEM, "slots": SLOTS, "decisions": True}
    return mt.replay(trace, policies=policy("balance", "balance"), **options).decisions


def regrets(trace: str | Path, file: Path) -> pl.DataFrame:
    """Return time and regret of hot, of the dispatch in a file, of balance and of optimal."""
    dispatches = {"hot": "hot", "learned": f"{file}:learned", "balance": "balance", "optimal": "optimal"}
    policies = [policy(name, dispatch) for name, dispatch in dispatches.items()]
    found = mt.replay(trace, system=SYSTEM, slots=SLOTS, policies=policies, regret=True)
    return found.summary.select("name", "total_s", "regret", "regret_equal_share")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("learned.py"), help="the file of the dispatch")
    parser.add_argument("--write", action="store_true", help="write the table into the how-to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        first, second = halves(TRACE, Path(folder))
        options.output.write_text(source(learn(decisions_of(first))), encoding="utf-8")
        found = regrets(second, options.output.resolve())
    table = [
        "| dispatch | total | regret | as `optimal` |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| `{name}` | {1e3 * total_s:,.0f} ms | {regret:.2%} | {equal:.1%} |"
            for name, total_s, regret, equal in found.iter_rows()
        ),
    ]
    print("\n".join(table))
    if options.write:
        write_between(PAGE, "learned", "\n".join(table))
        text = options.output.read_text(encoding="utf-8").splitlines()
        write_between(PAGE, "tree", "\n".join(["```console", *text[5:39], "                ...", "```"]))


if __name__ == "__main__":
    main()
