"""Residencies decide what the GPU keeps: one file each, with a record. The folder is the registry (`spec.choices`)."""
