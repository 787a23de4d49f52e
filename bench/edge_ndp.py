"""The experiment of arXiv 2601.03992: its framework and each step of it against MoNDE, batch 1, 2 to 6 NDP-DIMMs.

    python bench/edge_ndp.py            print all tables
    python bench/edge_ndp.py --write    also write bench/edge_ndp.md and .png, and the tables in docs/experiment.md
    python bench/edge_ndp.py --check    exit 1 if the tables in bench/edge_ndp.md or docs/experiment.md are stale

`--write` needs matplotlib (`pip install '.[bench]'`). Everything is seeded: a second run gives the same files. What is
measured stands in edge_ndp_found.py, the tables in edge_ndp_page.py.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from edge_ndp_found import MODELS, UNITS, Found, find
from edge_ndp_page import ALL, BALANCE, BOTH, PAPER_MEAN, TP, every_figure, page_parts
from markers import replaced_between

ROOT = Path(__file__).parents[1]
PAGE, TABLE, PLOT = ROOT / "docs/experiment.md", ROOT / "bench/edge_ndp.md", ROOT / "bench/edge_ndp.png"


def plot(found: Found, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Okabe and Ito's colours, apart for every kind of colour vision; markers differ too.
    styles = {
        ALL: ("#0072B2", "o", "all three"),
        BOTH: ("#CC79A7", "D", "TP + prefetch"),
        BALANCE: ("#D55E00", "s", "TP + balance"),
        TP: ("#009E73", "^", "TP"),
    }
    figure, panels = pyplot.subplots(1, len(MODELS), figsize=(10, 3.7), sharey=True, layout="constrained")
    for panel, model in zip(panels, MODELS, strict=True):
        panel.axhline(PAPER_MEAN, color="black", linestyle=":", linewidth=1.2, label=f"paper's mean ({PAPER_MEAN}x)")
        panel.axhline(1, color="grey", linewidth=1, label="MoNDE")
        for policy, (colour, marker, label) in styles.items():
            values = [found.over("monde", policy, model, units) or np.nan for units in UNITS]
            panel.plot(UNITS, values, color=colour, marker=marker, markersize=5, label=label)
        for units in UNITS:
            if found.seconds(model, units, "monde", "total_s") is None:
                panel.text(units, 1.06, "does not fit", rotation=90, ha="center", va="bottom", color="dimgrey")
        panel.set_title(model)
        panel.set_xlabel("NDP-DIMMs")
        panel.set_xticks(list(UNITS))
        panel.set_xlim(UNITS[0] - 0.4, UNITS[-1] + 0.4)
        panel.grid(axis="y", color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(0, None)
    panels[0].set_ylabel("end-to-end speed-up over MoNDE (x)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False, columnspacing=1.4)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = options.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--check", action="store_true")
    options = options.parse_args()
    found = find()
    full, parts = every_figure(found), page_parts(found)
    page = PAGE.read_text(encoding="utf-8")
    new_page = page
    for name, text in parts.items():
        new_page = replaced_between(new_page, name, text)
    if options.check:
        stale = [
            path.name
            for path, text in ((PAGE, new_page), (TABLE, full))
            if not path.is_file() or path.read_text(encoding="utf-8") != text
        ]
        if stale:
            sys.exit(f"{' and '.join(stale)} stale: run python bench/edge_ndp.py --write.")
        return
    print(full, *parts.values(), sep="\n\n")
    if options.write:
        PAGE.write_text(new_page, encoding="utf-8")
        TABLE.write_text(full, encoding="utf-8")
        plot(found, PLOT)


if __name__ == "__main__":
    main()
