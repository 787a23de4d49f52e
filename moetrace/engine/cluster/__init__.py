"""The replay of a cluster: experts on many GPUs, a network between them, steps cut into parts (docs/cluster.md)."""
