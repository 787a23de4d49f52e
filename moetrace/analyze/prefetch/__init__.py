"""What a prefetch would bring in time, whatever the hardware."""
