"""SGLang's expert distribution recorder: `stat`, `stat_approx`, `per_pass` and `per_token` dumps (.pt), older CSV.

Layout as SGLang writes it (0.4.6 to 0.5.23: `srt/eplb/expert_distribution.py`; `--expert-distribution-recorder-mode`):
* stat, stat_approx: one file, `logical_count` int32 [buffered steps, layers, experts], summed over the ranks. The
  buffer is a ring: unused steps are zero, and are dropped; which of the others came first is not known.
* per_pass: a file a rank, `records`, each with `forward_pass_id` and `global_physical_count` [layers, physical
  experts], and `last_physical_to_logical_map` [layers, physical experts]. Ranks are summed by forward pass.
* per_token: the same, and in each record `topk_ids_of_layer` int32 [layers, tokens, 8], physical ids with -1 as
  padding; `input_ids`, `positions`, `extend_seq_lens`, `forward_mode`. `sglang_tokens` makes rows of them.
* 0.4.3 to 0.4.5: `expert_distribution_rank{r}_timestamp{t}.csv` with layer_id,expert_id,count, which each dump resets.

Physical ids become logical ones by the map, which is the one at the time of the dump: if experts were rebalanced while
recording, earlier ids are wrong, and nothing tells so. Dumps are unpickled only by `torch.load(weights_only=True)`.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from moetrace.importers.captured import Capture, Counts, Hints
from moetrace.importers.sglang_counts import read_csv, read_passes, read_stat
from moetrace.importers.sglang_dumps import Dump, detailed, load
from moetrace.importers.sglang_tokens import read_tokens
from moetrace.spec.errors import MoetraceError, counted

_KEYS = (b"last_physical_to_logical_map", b"logical_count", b"records")
_CSV_HEADER = re.compile(rb"\s*layer_id,expert_id,count\s*\n")


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is an archive of torch.save with a recorder's keys, or such a CSV."""
    if first.startswith(b"PK\x03\x04"):
        return b"/data.pkl" in first and any(key in first for key in _KEYS)
    return bool(_CSV_HEADER.match(first))


def read(sources: Sequence[Path], hints: Hints) -> list[Capture | Counts]:
    """All ranks of one recording as one; a `stat` dump is one of its own, in the order of the sources."""
    csv = [path for path in sources if not _is_archive(path)]
    if csv:
        if len(csv) < len(sources):
            raise MoetraceError(f"{csv[0]} is no dump of torch.save, but others are: import them separately.")
        return [read_csv(sources, hints)]
    found: list[Counts] = []
    dumps: list[Dump] = []
    for path in sources:
        content = load(path)
        hints.reading(path.stat().st_size)
        if "logical_count" in content:
            found.append(read_stat(path, content, hints))
        else:
            dumps.append(detailed(path, content, hints.strict))
    if found and dumps:
        raise MoetraceError(f"{dumps[0].path} holds records, but {found[0].sources[0]} counts: import them separately.")
    if not dumps:
        return list(found)
    for dump in dumps:
        if dump.logical.shape[0] != dumps[0].logical.shape[0] or dump.logical.max() != dumps[0].logical.max():
            raise MoetraceError(
                f"{dump.path} and {dumps[0].path} are of other layers or experts: import them separately."
            )
    kinds = {"topk_ids_of_layer" in record for dump in dumps for record in dump.records}
    if not kinds:
        raise MoetraceError(f"{dumps[0].path} holds no records: start recording before the requests.")
    if len(kinds) > 1:
        raise MoetraceError(f"{dumps[0].path} holds records with topk_ids_of_layer and without, or other files do.")
    read_all = read_tokens(dumps, hints) if kinds.pop() else read_passes(dumps, hints)
    if left_out := sum(dump.left_out for dump in dumps):
        lost = next(dump.lost for dump in dumps if dump.lost)
        hints.note(f"{dumps[0].path}: left out {counted(left_out, 'record')}, the first because {lost}")
        read_all = read_all._replace(facts=read_all.facts | {"left_out_records": left_out})
    return [read_all]


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"
