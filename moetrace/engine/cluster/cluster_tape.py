"""A tape beside the replay of a cluster: which stage runs where and when, in the replay's own numbers.

The replay is compiled twice from the same lines, as that of one GPU is (`moetrace.engine.tape`).
"""

from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.cost import head_s
from moetrace.engine.state import records
from moetrace.jit.compile import kernel

KINDS = ("attention", "shared", "dispatch", "experts", "combine", "kernels", "fused", "head", "pause", "migration")
ATTENTION, SHARED, DISPATCH, EXPERTS, COMBINE, KERNELS, FUSED, HEAD_WORK, PAUSE, MIGRATION = range(len(KINDS))
NOBODY = -1  # unit of a PAUSE and a MIGRATION

STAGE_SLICE = np.dtype(
    [(name, np.int64) for name in ("step", "layer", "micro_batch", "chunk", "kind", "unit")]
    + [(name, np.float64) for name in ("start_s", "duration_s", "rows", "bytes")]
)


class ClusterTape(NamedTuple):
    """The record of a step. Times are seconds since its schedule began, after its pause.

    ``unit`` of a slice is a row of the unit log; slices without a layer, micro-batch or chunk have -1 there.
    """

    slices: Any  # STAGE_SLICE [n]
    ends: np.ndarray  # int64 [2]: slices that are written, and those before the layer at hand
    begun_s: np.ndarray  # float64 [r1, r2]: when the experts of each chunk begin
    crossing: np.ndarray  # float64 [r1, r2]: what each chunk sends over the wire, in rows to one GPU
    clock_s: np.ndarray  # float64 [1]: of a serial schedule, where the layer at hand begins


def new_tape(slices: int, micro_batches: int, chunks: int) -> ClusterTape:
    """Return an empty tape with room for ``slices`` slices."""
    parts = micro_batches, chunks
    room = records(slices, STAGE_SLICE)
    return ClusterTape(room, np.zeros(2, np.int64), np.zeros(parts), np.zeros(parts), np.zeros(1))


def most_slices(rows: int, top_k: int, layers: int, gpus: Any, cut: Any) -> int:
    """Return how many slices a step of ``rows`` rows can need, under GPUs (FABRIC) and a cut (CUT)."""
    parts = min(rows, int(cut["micro_batches"]))
    chunks = parts * min(rows, int(cut["chunks"]))
    run = min(chunks * int(gpus["experts"]), rows * top_k)
    attending = 1 + int(gpus["attention"])
    return layers * (attending * (2 * parts + 1) + 3 * chunks + run) + attending + 2


@kernel
def _note(tape, at, kind, unit, start_s, duration_s, byte_count):
    """Write a slice of ``at``, (step, layer, micro-batch, chunk), unless it takes no time."""
    if duration_s <= 0.0:
        return
    tape.ends[0] += 1
    entry = tape.slices[min(tape.ends[0], tape.slices.size) - 1]
    entry.step, entry.layer, entry.micro_batch, entry.chunk = at
    entry.kind, entry.unit, entry.rows = kind, unit, 0.0
    entry.start_s, entry.duration_s, entry.bytes = start_s, duration_s, byte_count


@kernel
def _note_attention(tape, at, kind, fabric, start_s, seconds, starts_s, byte_count):
    """Write what all attention GPUs do, each in its own time, of which launches are ``starts_s``."""
    gpus = fabric.gpus[0]
    if seconds <= 0.0:
        return
    for g in range(gpus.attention):
        own_s = seconds - (seconds - starts_s) * fabric.lead[g]
        _note(tape, at, kind, g, start_s, own_s, byte_count)
    _note(tape, at, kind, _resource(gpus, 0), start_s, seconds, 0.0)


@kernel
def _resource(gpus, number):
    """Return the unit log's row of a resource: attention (all GPUs), dispatch, experts, combine."""
    if gpus.colocated:
        return gpus.experts + number % 2
    return gpus.attention + gpus.experts + number


@kernel
def note_chunk(tape, at, gpus, crossing, each):
    """Write what each GPU runs of a chunk, to be placed by `note_layer`, once it is known when."""
    if tape is None:
        return
    tape.crossing[at[2], at[3]] = crossing.total
    for g in range(each.size):
        gpu = each[g]
        if gpu.chunk_rows > 0:
            unit = g + (0 if gpus.colocated else gpus.attention)
            _note(tape, at, EXPERTS, unit, 0.0, gpu.chunk_s, gpu.chunk_bytes)
            if gpu.chunk_s > 0.0:
                tape.slices[min(tape.ends[0], tape.slices.size) - 1].rows = gpu.chunk_rows


@kernel(inline=False)
def note_layer(tape, step, phase, layer, fabric, books, parts):
    """Write the stages of a layer, and place what its GPUs run; ``parts``: seconds of further kernels, fused or -1."""
    if tape is None:
        return
    gpus, stages, agenda, net = fabric.gpus[0], books.stages, books.agenda, fabric.network[phase]
    work = fabric.machine.work[fabric.cut[phase].apart]
    further_s, fused_s = parts
    last = min(tape.ends[0], tape.slices.size)
    if gpus.serial:
        _set_ends(tape.clock_s[0], stages, fused_s, agenda)
    for i in range(stages.rows.shape[0]):
        if stages.all_rows[i] == 0:
            continue
        at = (step, layer, i, -1)
        start_s, own_s = agenda.attended_s[i] - stages.attention_s[i], stages.attention_s[i] - work.overhead_s
        _note_attention(tape, at, ATTENTION, fabric, start_s, own_s, gpus.start_s, work.dense_bytes)
        start_s = agenda.shared_s[i] - stages.shared_s[i]
        _note_attention(tape, at, SHARED, fabric, start_s, stages.shared_s[i], gpus.start_s, gpus.shared_bytes)
        for j in range(stages.rows.shape[1]):
            if stages.rows[i, j] == 0:
                continue
            at = (step, layer, i, j)
            tape.begun_s[i, j] = agenda.done_s[i, j] - stages.experts_s[i, j]
            if fused_s >= 0.0:
                tape.begun_s[i, j] = agenda.done_s[i, j] - fused_s
                _note(tape, at, FUSED, _resource(gpus, 2), tape.begun_s[i, j], fused_s, 0.0)
                continue
            sent = tape.crossing[i, j]
            begin_s, seconds = agenda.arrived_s[i, j] - stages.dispatch_s[i, j], stages.dispatch_s[i, j]
            _note(tape, at, DISPATCH, _resource(gpus, 1), begin_s, seconds, sent * net.dispatch_bytes)
            _note(tape, at, EXPERTS, _resource(gpus, 2), tape.begun_s[i, j], stages.experts_s[i, j], 0.0)
            begin_s, seconds = agenda.back_s[i, j] - stages.combine_s[i, j], stages.combine_s[i, j]
            _note(tape, at, COMBINE, _resource(gpus, 3), begin_s, seconds, sent * net.combine_bytes)
    for n in range(tape.ends[1], last):
        entry = tape.slices[n]
        entry.start_s = tape.begun_s[entry.micro_batch, entry.chunk]
    if gpus.serial:
        ended_s = agenda.done_s[0, 0] if fused_s >= 0.0 else agenda.back_s[0, 0]
        starts_s = gpus.start_s * (gpus.kernels - 1)
        _note_attention(tape, (step, layer, -1, -1), KERNELS, fabric, ended_s, further_s, starts_s, 0.0)
        tape.clock_s[0] = ended_s + further_s
    tape.ends[1] = min(tape.ends[0], tape.slices.size)


@kernel
def _set_ends(now_s, stages, fused_s, agenda):
    """Set when the stages of a serial layer that begins at ``now_s`` end: one after another."""
    agenda.attended_s[0] = now_s + stages.attention_s[0]
    agenda.shared_s[0] = agenda.attended_s[0] + stages.shared_s[0]
    agenda.arrived_s[0, 0] = agenda.shared_s[0] + stages.dispatch_s[0, 0]
    agenda.done_s[0, 0] = agenda.arrived_s[0, 0] + stages.experts_s[0, 0]
    if fused_s >= 0.0:
        agenda.done_s[0, 0] = agenda.shared_s[0] + fused_s
    agenda.back_s[0, 0] = agenda.done_s[0, 0] + stages.combine_s[0, 0]


@kernel(inline=False)
def note_step(tape, step, fabric, schedule_s, row, slowed):
    """Write the head, with which a step of ``schedule_s`` seconds ends, its pause, and a migration beside it."""
    if tape is None:
        return
    at = (step, -1, -1, -1)
    start_s = fabric.gpus[0].start_s
    _note_attention(
        tape, at, HEAD_WORK, fabric, schedule_s, head_s(fabric.machine), start_s, fabric.machine.work[0].head_bytes
    )
    _note(tape, at, PAUSE, NOBODY, -row.pause_s, row.pause_s, row.moved_bytes)
    if slowed < 1.0:
        _note(tape, at, MIGRATION, NOBODY, 0.0, row.duration_s, 0.0)
