"""How skewed, repetitive and predictable routing is."""
