"""What was routed: the trace file, its generators and importers."""
