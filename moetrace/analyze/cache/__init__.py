"""What a cache of experts would hit, whatever the hardware."""
