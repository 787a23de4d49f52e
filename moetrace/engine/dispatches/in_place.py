"""`in-place`: every expert where its weights are (llama.cpp with `--n-cpu-moe`), and long prompts on the GPU."""

from moetrace.spec.choices import Dispatch


def where_weights_are(state, view, layer, load, plan):
    """Run residents on the GPU and the others at home; from ``gpu_rows`` rows on, fetch these."""
    fetches = 0 < view.gpu_rows <= view.rows
    for i in range(load.size):
        plan[i] = fetches or view.active[i].resident


RECORD = Dispatch(
    name="in-place",
    meaning="residents run on the GPU, the others at home; nothing is fetched, except in steps of many rows",
    hook=where_weights_are,
    parameters=("gpu_rows",),
    reads_state=False,
    list_order=60,
)
