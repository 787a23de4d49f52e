"""Hits of a cache of experts, independent of the hardware."""
