"""The constants of a real machine: measured times of expert layers, copies and transfers in, a system's TOML out.

A table of measured times (`Measured`) comes from a file or from this machine (`this_machine`). `fitting` finds the
rates and the start that miss it least, judged on shapes that were not fitted. `system_file` writes them into a system's
TOML.
"""

from moetrace.calibration.calibrate import Calibrated, calibrate
from moetrace.calibration.measured import Measured, read_measured

__all__ = ["Calibrated", "Measured", "calibrate", "read_measured"]
