"""One file a foreign format: what an engine recorded, read as a `Capture` or as `Counts`."""
