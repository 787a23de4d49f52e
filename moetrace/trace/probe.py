"""Read the attributes of an HDF5 file, and all else that opening it takes; also run as a program by `own_process`.

It imports h5py and nothing of moetrace, so that the program starts fast. No data is read here except attributes.
"""

import json
import sys
from collections.abc import Iterable
from typing import Any

import h5py

# name -> its kind ("text", "number", "large" or "other"), and the value of the first two. Missing names are left out.
Attributes = dict[str, tuple[str, Any]]


def attributes_of(item: Any, names: Iterable[str], most_bytes: int) -> Attributes:
    """Read attributes of a file or dataset: scalars that are text of up to `most_bytes`, or whole numbers."""
    found: Attributes = {}
    for name in names:
        if name in item.attrs:
            found[name] = _value(item, name, most_bytes)
    return found


def _value(item: Any, name: str, most_bytes: int) -> tuple[str, Any]:
    handle = item.attrs.get_id(name)
    if handle.shape != () or not isinstance(handle.get_type(), h5py.h5t.TypeStringID | h5py.h5t.TypeIntegerID):
        return "other", None
    # Text of variable length is held elsewhere: HDF5 tells its length only with the text.
    value = item.attrs[name] if handle.get_storage_size() <= most_bytes else None
    if value is None or (isinstance(value, str | bytes) and len(value) > most_bytes):
        return "large", None
    if isinstance(value, bytes):
        return "text", value.decode("utf-8", errors="replace")
    return ("text", value) if isinstance(value, str) else ("number", int(value))


def hard_path(file: h5py.File, path: str) -> Any:
    """The object at `path`, None without one, False if a link on the way leads elsewhere (it is not followed)."""
    item: Any = file
    for part in path.strip("/").split("/"):
        if not isinstance(item, h5py.Group) or part not in item.keys():  # noqa: SIM118
            return None
        if not isinstance(item.get(part, getlink=True), h5py.HardLink):
            return False
        item = item[part]
    return item


def _answer(task: dict[str, Any]) -> dict[str, Attributes]:
    """Do what opening the file does; return the attributes of the root ("/") and of each dataset."""
    answer: dict[str, Attributes] = {}
    with h5py.File(task["file"], "r", driver="sec2", locking=False) as file:
        answer["/"] = attributes_of(file, task["root"], task["most_bytes"])
        for path in task["paths"]:
            dataset = hard_path(file, path)
            if not isinstance(dataset, h5py.Dataset):
                continue
            answer[path] = attributes_of(dataset, task["names"], task["most_bytes"])
            properties = dataset.id.get_create_plist()
            layout = properties.get_layout()
            if layout == h5py.h5d.CHUNKED and dataset.shape is not None:
                if dataset.id.get_num_chunks() <= task["most_chunks"]:
                    dataset.id.chunk_iter(lambda _: None)
            elif layout == h5py.h5d.CONTIGUOUS:
                dataset.id.get_offset()
            properties.get_external_count()
            _ = dataset.dtype
    return answer


def main() -> None:
    """Read a task from stdin as JSON, write the answer to stdout as JSON; within limits of time and memory."""
    task = json.load(sys.stdin)
    if sys.platform != "win32":
        import resource

        for what, most in ((resource.RLIMIT_CPU, task["cpu_s"]), (resource.RLIMIT_AS, task["memory_bytes"])):
            _, hard = resource.getrlimit(what)
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(what, (most, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer: Any = _answer(task)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        answer = {}  # who asked finds the same, and says it
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
