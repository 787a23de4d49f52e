"""`gpu`: every expert on the GPU, fetching missing ones."""

from moetrace.spec.choices import Dispatch


def all_on_gpu(state, view, layer, load, plan):
    """Give every expert to the GPU."""
    for i in range(load.size):
        plan[i] = 1


RECORD = Dispatch(
    name="gpu",
    meaning="all active experts run on the GPU, missing ones are fetched",
    hook=all_on_gpu,
    without_units=True,
    reads_state=False,
    list_order=20,
)
