"""What comes out of a replay, as Polars frames and files."""
