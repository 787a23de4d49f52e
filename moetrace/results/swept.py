"""What reports of sweeps are made from: `sweep.json` and `cells.parquet`, as a stranger's folder holds them."""
from dataclasses import dataclass
from pathlib import Path
@dataclass(frozen=True)
class Swept:
    x: int = 0
def read_swept(folder: Path) -> Swept:
    """x"""
    return Swept()
