"""`split`: as `balance`; then one expert is shared by the GPU and the units, if the layer gets faster."""

from moetrace.engine.dispatch import move_while_faster, share_one
from moetrace.spec.choices import Dispatch


def shared(state, view, layer, load, plan):
    """Balance, then share one."""
    moe_s = move_while_faster(view, load.size, plan)
    share_one(view, load.size, plan, moe_s)


RECORD = Dispatch(
    name="split",
    meaning="as balance; then the GPU and the units share one expert, if the layer gets faster",
    hook=shared,
    partners=(("placement", "tp"),),
    reads_state=False,
    splits=True,
    list_order=45,
)
