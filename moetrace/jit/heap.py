"""Heaps that kernels share: a plain one of keys and numbers, and one that knows where each of its keys stands."""

from moetrace.jit.compile import kernel

RANK, KEY = 0, 1  # columns of a heap that knows its keys' places
# Children of a key in such a heap: 64 bytes of them. In a prototype 2 took 1.0 to 1.4 times as long, 8 0.85 to 1.07.
ARITY = 4


@kernel
def sink(key, number, size, at):
    """Restore a binary heap of ``size`` whose entry ``at`` grew: least key first, then least number."""
    own_key, own_number = key[at], number[at]
    child = 2 * at + 1
    while child < size:
        right = child + 1
        if right < size and (key[right] < key[child] or (key[right] == key[child] and number[right] < number[child])):
            child = right
        if key[child] > own_key or (key[child] == own_key and number[child] > own_number):
            break
        key[at], number[at] = key[child], number[child]
        at, child = child, 2 * child + 1
    key[at], number[at] = own_key, own_number


@kernel
def rise_placed(heap, place, at, rank, key):
    """Put a key at `at`, or nearer to the root, before keys of greater rank."""
    while at > 0:
        parent = (at - 1) // ARITY
        if heap[parent, RANK] <= rank:
            break
        _move(heap, place, parent, at)
        at = parent
    heap[at, RANK], heap[at, KEY], place[key] = rank, key, at


@kernel
def sink_placed(heap, place, count, at, rank, key):
    """Put a key at `at`, or farther from the root, after keys of smaller rank; the heap has `count` keys."""
    while ARITY * at + 1 < count:
        first = ARITY * at + 1
        least, rank_of_least = first, heap[first, RANK]
        for child in range(first + 1, first + ARITY):
            # Beyond the last key there is something, so that this loop has no branch.
            better = (heap[child, RANK] < rank_of_least) & (child < count)
            least, rank_of_least = (child, heap[child, RANK]) if better else (least, rank_of_least)
        if rank_of_least >= rank:
            break
        _move(heap, place, least, at)
        at = least
    heap[at, RANK], heap[at, KEY], place[key] = rank, key, at


@kernel
def _move(heap, place, source, target):
    """Copy the entry at source to target, and note its key's new place."""
    heap[target, RANK], heap[target, KEY] = heap[source, RANK], heap[source, KEY]
    place[heap[source, KEY]] = target
