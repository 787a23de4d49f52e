"""Route traces of BigMoeOnEdge, as `moetrace.importers.bigmoeonedge` describes them."""

from pathlib import Path

from support.writers import Sample, routing


def samples(folder: Path) -> list[Sample]:
    header = "# route_trace v1\n# model=Some-Q4.gguf arch=x n_layer=3 n_expert=8 n_expert_used=2\n"
    header += "".join(f"# layer={layer} expert_bytes={1000 + layer} dense_bytes=5\n" for layer in range(3))
    lines = ["turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"]
    for row, cells in enumerate(routing(4, 3, 2, 8).tolist()):
        for layer, ids in enumerate(cells):
            lines += [f"0,{row // 2},{row},{layer},{k},{i},0.5,{k},{1000 + layer}" for k, i in enumerate(ids)]
    path = folder / "a.csv"
    path.write_text(header + "\n".join(lines) + "\n")
    return [Sample([path])]
