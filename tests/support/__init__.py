"""What tests share: helpers, and independent oracles."""
