"""How often each expert was chosen: the counts that skew, static lists and phases are about."""

from moetrace.jit.compile import kernel


@kernel(inline=False)
def count(ids, label, counts):
    """Add the choices of ids uint16 [n, k] to counts int64 [labels, E], each row's under its label uint8 [n]."""
    for t in range(len(ids)):
        own = counts[label[t]]
        for expert in ids[t]:
            if expert != 65535:
                own[expert] += 1
