"""A small system as a TOML file, for tests of what a spec takes and refuses."""

SYSTEM = """\
name = "mine"
[gpu]
name = "some GPU"
tflops = 100
bandwidth_gb_s = 1000
memory_gb = 16
reserve_gb = 2
launch_us = 5
[ndp]
units = 2
gmac_s = 256
bandwidth_gb_s = 100
capacity_gb = 32
command_us = 2
[link]
bandwidth_gb_s = 50
latency_us = 5
"""


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path
