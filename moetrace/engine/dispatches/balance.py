"""`balance` (arXiv 2601.03992): experts move to the GPU one by one while the layer gets faster."""

from moetrace.engine.dispatch import move_while_faster
from moetrace.spec.choices import Dispatch


def balanced(state, view, layer, load, plan):
    """Start with every expert on its units."""
    move_while_faster(view, load.size, plan)


RECORD = Dispatch(
    name="balance",
    meaning="experts move to the GPU one by one while the layer gets faster",
    hook=balanced,
    reads_state=False,
    list_order=40,
)
