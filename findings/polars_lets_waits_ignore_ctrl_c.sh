#!/usr/bin/env bash
# After `import polars`, Ctrl-C no longer ends a wait for a thread, a future, a queue or an event.
#
# Versions: polars 2.1.0, Python 3.11 or later, Linux.
# Python raises KeyboardInterrupt in a main thread that waits for a lock, since the signal interrupts the wait. Importing
# Polars puts its own handler of SIGINT before Python's, with SA_RESTART: the system then takes the wait up again before
# Python has a say. signal.getsignal shows no difference. A wait with a timeout is interrupted all the same.
# Seen: without Polars, `Event().wait()` ends at once; with it, never, while `Event().wait(60)` does.
# It makes a batch of simulations in a process pool deaf to Ctrl-C as soon as its tables are made with Polars, and
# `future.result()`, `thread.join()` and `queue.get()` with it.
# Give waits a timeout, in a loop, or call signal.siginterrupt(signal.SIGINT, True) after the import.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'polars==2.1.0'
cat > "$folder/waits.py" <<'PY'
import signal
import sys
import threading

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without
if sys.argv[1] != "none":
    import polars
if sys.argv[1] == "mended":
    signal.siginterrupt(signal.SIGINT, True)
print("ready", flush=True)
try:
    threading.Event().wait(60 if sys.argv[1] == "timeout" else None)
except KeyboardInterrupt:
    print("interrupted", flush=True)
PY
"$folder/venv/bin/python" - "$folder/waits.py" <<'PY'
import signal
import subprocess
import sys
import time

for how, is_heard in (("none", True), ("polars", False), ("timeout", True), ("mended", True)):
    process = subprocess.Popen([sys.executable, sys.argv[1], how], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    try:
        said, _ = process.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
    print(f"{how}: {said.strip() or 'still waits after 5 s'}")
    assert (said == "interrupted\n") == is_heard, "this has changed"
PY
