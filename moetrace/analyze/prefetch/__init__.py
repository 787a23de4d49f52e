"""Experts that a prefetch would bring in time, independent of the hardware."""
