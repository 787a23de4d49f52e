"""The loop over the steps and layers of a cluster, in Numba."""

from typing import Any

import numpy as np

from moetrace.engine.cluster.cluster_books import CLUSTER_STEP, Books, new_books
from moetrace.engine.cluster.cluster_tape import new_tape, note_chunk, note_layer, note_step
from moetrace.engine.cluster.fabric import CUT, FABRIC, NETWORK, Fabric
from moetrace.engine.cluster.layer_stages import attend_s, cross, fuse_s, run_experts, share_s, transfer_s
from moetrace.engine.cluster.order import add_layer, begin_step
from moetrace.engine.cluster.placed import PlacedCopies
from moetrace.engine.cluster.routes import route
from moetrace.engine.cost import head_s
from moetrace.engine.layer import less
from moetrace.engine.replay import smallest_work
from moetrace.engine.state import records
from moetrace.jit.compile import kernel


def replay_cluster_signature() -> Any:
    """Return the types that ``replay_cluster`` is compiled for."""
    from numba import typeof, types

    batch, fabric, copies, books = smallest_cluster()
    return types.int64(*map(typeof, (batch, fabric, copies, books)), types.int64, types.int64, types.float64)


def smallest_cluster() -> tuple[Any, Fabric, PlacedCopies, Books]:
    """Return the smallest possible arguments, of which the types are read."""
    work = smallest_work()
    gpus = records(1, FABRIC)
    for name in ("attention", "experts", "colocated", "kernels", "nodes"):
        gpus[name] = 1
    fabric = Fabric(work.machine, gpus, records(3, NETWORK), records(3, CUT), np.ones(1), np.zeros(1))
    copies = PlacedCopies(np.zeros((1, 2), np.int32), np.zeros((1, 1), np.int32), np.zeros((1, 1)))
    return work.batch, fabric, copies, new_books(fabric, 1, 1, (1, 1), records(1, CLUSTER_STEP))


@kernel
def _tokens_of(batch, begin, end, contexts, clock):
    """Return the cached tokens that rows attend to: for each of their requests, its highest position + 1 among them."""
    clock.seen += 1
    tokens = 0
    for row in range(begin, end):
        request, reach = batch.request[row], batch.position[row] + 1
        if contexts.seen[request] != clock.seen:
            contexts.seen[request], contexts.tokens[request] = clock.seen, 0
        if reach > contexts.tokens[request]:
            tokens += reach - contexts.tokens[request]
            contexts.tokens[request] = reach
    return tokens


@kernel(inline=False)
def _cut_step(batch, s, fabric, cut, books):
    """Cut a step into micro-batches and chunks: their rows, and the attention and shared experts of each."""
    stages, first, rows = books.stages, batch.offset[s], batch.steps.rows[s]
    for i in range(cut.micro_batches):
        begin, end = i * rows // cut.micro_batches, (i + 1) * rows // cut.micro_batches
        own = end - begin
        stages.all_rows[i], stages.attention_s[i], stages.shared_s[i] = own, 0.0, 0.0
        for j in range(cut.chunks):
            stages.rows[i, j] = (j + 1) * own // cut.chunks - j * own // cut.chunks
            stages.dispatch_s[i, j], stages.experts_s[i, j], stages.combine_s[i, j] = 0.0, 0.0, 0.0
        if own == 0:
            continue
        tokens = batch.steps.kv_tokens[s]
        if cut.micro_batches > 1:
            tokens = _tokens_of(batch, first + begin, first + end, books.contexts, books.clock[0])
        stages.attention_s[i] = attend_s(fabric, cut, own, tokens)
        stages.shared_s[i] = share_s(fabric.gpus[0], cut, own)
    for i in range(cut.micro_batches, stages.all_rows.size):  # of another phase, cut into more parts
        stages.all_rows[i] = 0
    for i in range(stages.rows.shape[0]):
        for j in range(stages.rows.shape[1]):
            if i >= cut.micro_batches or j >= cut.chunks:
                stages.rows[i, j] = 0


@kernel(inline=False)
def _run_layer(batch, s, layer, fabric, copies, books, tape):
    """Route the rows of a layer chunk by chunk; fill the seconds of its stages; return those of the fused kernel."""
    gpus, net, stages, routes = fabric.gpus[0], fabric.network[batch.steps.phase[s]], books.stages, books.routes
    row, of_layer, slowed, fused_s = books.log.step[s], books.log.layer[layer], books.clock[0].slowed, 0.0
    place = (layer, batch.steps.first + s, batch.offset[s])
    begin = batch.offset[s]
    for e in range(routes.nth.size):
        routes.nth[e] = 0
    for g in range(stages.each.size):
        each = stages.each[g]
        each.busy_s, each.weight_bytes, each.rows, each.slots = 0.0, 0.0, 0, 0
    for i in range(stages.rows.shape[0]):
        for j in range(stages.rows.shape[1]):
            rows = stages.rows[i, j]
            if rows == 0:
                continue
            routed = route(batch.experts, (begin, begin + rows), place, gpus, net.dedup, copies, routes)
            begin += rows
            crossing = cross(gpus, routes)
            to_s = transfer_s(gpus, net, slowed, rows, crossing, net.dispatch_bytes, net.dispatch_s)
            run_s = run_experts(layer, gpus, copies, routes, stages.each)
            note_chunk(tape, (place[1], layer, i, j), gpus, crossing, stages.each)
            back_s = transfer_s(gpus, net, slowed, rows, crossing, net.combine_bytes, net.combine_s)
            if gpus.serial:
                fused_s = fuse_s(gpus, net, slowed, rows, crossing, routes, stages.each)
            wire_bytes = crossing.total * (net.dispatch_bytes + net.combine_bytes)
            stages.dispatch_s[i, j], stages.experts_s[i, j], stages.combine_s[i, j] = to_s, run_s, back_s
            row.dispatch_s += to_s
            row.experts_s += run_s
            row.combine_s += back_s
            row.network_bytes += wire_bytes
            row.distinct += routes.sums[0].distinct
            row.routed += routed
            of_layer.dispatch_s += to_s
            of_layer.experts_s += run_s
            of_layer.combine_s += back_s
            of_layer.network_bytes += wire_bytes
            of_layer.distinct += routes.sums[0].distinct
            of_layer.routed += routed
            for g in range(routes.into.size):
                routes.into[g] = 0
            for node in range(routes.into_node.size):
                routes.into_node[node] = 0
    return fused_s


@kernel(inline=False)
def _note_layer(layer, s, gpus, books):
    """Add what each GPU did in a layer to the logs; return imbalance in seconds and in rows, -1 without rows."""
    each, log = books.stages.each, books.log
    behind = 0 if gpus.colocated else gpus.attention
    most_s, sum_s, most_rows, all_rows = 0.0, 0.0, 0, 0
    for g in range(each.size):
        gpu, unit = each[g], log.unit[behind + g]
        unit.busy_s += gpu.busy_s
        unit.rows += gpu.rows
        unit.bytes += gpu.weight_bytes
        unit.experts += gpu.slots
        most_s, sum_s = max(most_s, gpu.busy_s), sum_s + gpu.busy_s
        most_rows, all_rows = max(most_rows, gpu.rows), all_rows + gpu.rows
        log.layer[layer].gpu_experts += gpu.slots
    if all_rows == 0 or sum_s == 0.0:
        return -1.0, -1.0
    imbalance, imbalance_rows = most_s * each.size / sum_s, most_rows * each.size / all_rows
    log.layer[layer].imbalance_sum += imbalance
    log.layer[layer].imbalance_rows_sum += imbalance_rows
    log.layer[layer].imbalance_count += 1
    return imbalance, imbalance_rows


@kernel
def _between_kernels_s(gpus, rows):
    """Return the seconds that the further kernels of a layer add: their launches, and rows written and read again."""
    own = -(-rows // gpus.attention)
    further = gpus.kernels - 1
    return further * gpus.start_s, further * 2.0 * own * gpus.row_bytes * gpus.attention_s_per_byte


@kernel(inline=False)
def _end_step(s, batch, fabric, further_s, parts, books, tape):
    """Note the time of a step, its GPUs and resources.

    ``further_s`` is the time of further kernels of its layers; ``parts`` are its micro-batches with rows.
    """
    gpus, log, clock, row = fabric.gpus[0], books.log, books.clock[0], books.log.step[s]
    network = fabric.network[batch.steps.phase[s]]
    row.head_s = head_s(fabric.machine)
    row.dense_s = row.attention_s
    row.pause_s, row.moved_bytes = 0.0, clock.moved_bytes
    if clock.most_into > 0.0:
        row.pause_s = network.dispatch_s + clock.most_into / network.bytes_s
        clock.pauses += 1
    clock.most_into, clock.moved_bytes = 0.0, 0.0
    row.wait_s = row.pause_s
    row.exposed_s = max(row.duration_s - row.exposed_s, 0.0)
    schedule_s = row.duration_s
    row.duration_s = row.duration_s + row.head_s + row.pause_s
    note_step(tape, batch.steps.first + s, fabric, schedule_s, row, clock.slowed)
    row.moe_s = max(row.duration_s - row.dense_s - row.head_s - row.pause_s, 0.0)
    work, times = fabric.machine.work[0], parts * fabric.machine.weight_bytes.shape[0]
    idle_s = work.overhead_s * times
    read_bytes = work.head_bytes + work.dense_bytes * times
    attended_s = row.attention_s - idle_s + row.head_s + further_s
    apart = fabric.cut[batch.steps.phase[s]].apart
    starts_s = gpus.start_s * (times * (1 + apart) + 1)
    if not gpus.fused:
        starts_s += gpus.start_s * (gpus.kernels - 1) * fabric.machine.weight_bytes.shape[0]
    for g in range(gpus.attention):
        log.unit[g].busy_s += attended_s - (attended_s - starts_s) * fabric.lead[g]
        log.unit[g].bytes += read_bytes
    if gpus.colocated:
        first = gpus.experts
        log.unit[first].busy_s += attended_s + row.experts_s
        log.unit[first + 1].busy_s += row.dispatch_s + row.combine_s
        log.unit[first + 1].bytes += row.network_bytes
    else:
        first = gpus.attention + gpus.experts
        back_bytes = row.network_bytes * network.combine_bytes / (network.dispatch_bytes + network.combine_bytes)
        log.unit[first].busy_s += attended_s
        log.unit[first + 1].busy_s += row.dispatch_s
        log.unit[first + 1].bytes += row.network_bytes - back_bytes
        log.unit[first + 2].busy_s += row.experts_s
        log.unit[first + 3].busy_s += row.combine_s
        log.unit[first + 3].bytes += back_bytes
    clock.now_s += row.duration_s
    books.total[0].overhead_s += idle_s
    _add_up(row, books.total[0])


@kernel
def _add_up(row, total):
    """Add a step to the sums over all steps."""
    total.head_s += row.head_s
    total.attention_s += row.attention_s
    total.dispatch_s += row.dispatch_s
    total.experts_s += row.experts_s
    total.combine_s += row.combine_s
    total.network_bytes += row.network_bytes
    total.pause_s += row.pause_s
    total.exposed_s += row.exposed_s
    total.moved_bytes += row.moved_bytes
    total.launch_tax_s += row.launch_tax_s
    total.locality_tax_s += row.locality_tax_s
    total.barrier_tax_s += row.barrier_tax_s
    total.distinct += row.distinct
    total.routed += row.routed


@kernel(inline=False)
def _replay_step(batch, s, fabric, copies, books, tape):
    """Replay one step."""
    gpus, cut, row = fabric.gpus[0], fabric.cut[batch.steps.phase[s]], books.log.step[s]
    stages, layers = books.stages, copies.start.shape[0]
    _cut_step(batch, s, fabric, cut, books)
    begin_step(books.agenda)
    begin_step(books.free_agenda)
    attended_s, parts = 0.0, 0
    for i in range(cut.micro_batches):
        attended_s += stages.attention_s[i] + stages.shared_s[i]
        parts += stages.all_rows[i] > 0
    launch_s, write_s = _between_kernels_s(gpus, batch.steps.rows[s])
    bulk_s, fused_all_s, free_s, further_s, count = 0.0, 0.0, 0.0, 0.0, 0
    imbalance_sum, rows_sum = 0.0, 0.0
    if not gpus.fused:
        further_s = layers * (launch_s + write_s)
    for layer in range(layers):
        before_s = row.dispatch_s + row.experts_s + row.combine_s
        run_before_s = row.experts_s
        fused_s = _run_layer(batch, s, layer, fabric, copies, books, tape)
        row.attention_s += attended_s
        books.log.layer[layer].attention_s += attended_s
        books.log.layer[layer].dense_s += attended_s
        moe_s = row.dispatch_s + row.experts_s + row.combine_s - before_s
        books.log.layer[layer].moe_s += fused_s if gpus.fused else moe_s
        if gpus.serial:
            bulk_s += attended_s + moe_s
            fused_all_s += attended_s + fused_s
            free_s += attended_s + row.experts_s - run_before_s
        else:
            add_layer(gpus, cut, stages, 1.0, books.agenda)
            add_layer(gpus, cut, stages, 0.0, books.free_agenda)
        parts_s = (0.0 if gpus.fused else launch_s + write_s, fused_s if gpus.fused else -1.0)
        note_layer(tape, batch.steps.first + s, batch.steps.phase[s], layer, fabric, books, parts_s)
        imbalance, imbalance_rows = _note_layer(layer, s, gpus, books)
        if imbalance >= 0.0:
            imbalance_sum += imbalance
            rows_sum += imbalance_rows
            count += 1
    row.imbalance = imbalance_sum / count if count > 0 else np.nan
    row.imbalance_rows = rows_sum / count if count > 0 else np.nan
    if gpus.serial:
        row.duration_s = fused_all_s if gpus.fused else bulk_s + further_s
        row.exposed_s = free_s if gpus.fused else free_s + further_s  # the step with transfers that take no time
    else:
        row.duration_s = books.agenda.free[0].last
        row.exposed_s = books.free_agenda.free[0].last
    if gpus.serial:
        row.launch_tax_s, row.locality_tax_s = layers * launch_s, layers * write_s
        row.barrier_tax_s = bulk_s - fused_all_s
    _end_step(s, batch, fabric, further_s, parts, books, tape)


@kernel(signature=replay_cluster_signature)
def replay_cluster(batch, fabric, copies, books, first, stop, wake_s):
    """Replay the steps from first to stop - 1 of a block, up to one that begins at ``wake_s`` or later.

    Returns the number in the block of the step that it did not replay any more. ``log.step`` are those of the block.
    """
    for s in range(first, stop):
        if not less(books.clock[0].now_s, wake_s):
            return s
        _replay_step(batch, s, fabric, copies, books, None)
    return stop


def record_signature() -> Any:
    """Return the types that ``record_step`` is compiled for."""
    from numba import typeof, types

    batch, fabric, copies, books = smallest_cluster()
    return types.void(*map(typeof, (batch, fabric, copies, books)), types.int64, typeof(new_tape(1, 1, 1)))


@kernel(signature=record_signature)
def record_step(batch, fabric, copies, books, s, tape):
    """Replay step s of a block with a tape beside it."""
    _replay_step(batch, s, fabric, copies, books, tape)


def bound_signature() -> Any:
    """Return the types that ``bound_s`` is compiled for."""
    from numba import typeof, types

    batch, fabric, _, _ = smallest_cluster()
    return types.float64(*map(typeof, (batch.steps, batch.demand, fabric)), types.float64)


@kernel(signature=bound_signature)
def bound_s(steps, demand, fabric, total_s):
    """Add to ``total_s`` the seconds of a block if all GPUs shared all work perfectly: no schedule beats it.

    Attention is shared evenly, so the slowest GPU ends it; of experts each GPU runs as much as it can. Where attention
    and experts have GPUs of their own, the longer of the two counts. Transfers, starts of experts and everything that
    waits are left out, so that no placement and no schedule is faster.
    """
    gpus, layers = fabric.gpus[0], fabric.machine.weight_bytes.shape[0]
    for s in range(steps.rows.size):
        rows, tokens = steps.rows[s], steps.kv_tokens[s]
        cut = fabric.cut[steps.phase[s]]
        attended_s = layers * (attend_s(fabric, cut, rows, tokens) + share_s(gpus, cut, rows))
        run_s = 0.0
        for i in range(demand.start[s * layers], demand.start[(s + 1) * layers]):
            run_s += demand.rows[i] * gpus.s_per_row
        read_s = 0.0
        for layer in range(layers):
            for i in range(demand.start[s * layers + layer], demand.start[s * layers + layer + 1]):
                read_s += fabric.machine.weight_bytes[layer, demand.expert[i]] * gpus.s_per_byte
        experts_s = max(run_s, read_s) / gpus.all_factors
        total_s += head_s(fabric.machine) + (attended_s + experts_s if gpus.colocated else max(attended_s, experts_s))
    return total_s
