"""How evenly placements share the load."""
