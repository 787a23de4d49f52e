"""Many replays: sweeps, and their figures against a committed baseline."""
