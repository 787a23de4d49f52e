"""Questions that a trace answers alone, without a machine: caches, balance, locality."""
