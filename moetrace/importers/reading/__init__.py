"""Readers that importers share: text, tables, tensors, NumPy files, HTTP responses."""
