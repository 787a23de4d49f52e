"""Prefetches move experts before demand: one file each, with a record. The folder is the registry (`spec.choices`)."""
