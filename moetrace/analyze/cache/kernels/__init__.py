"""The policies of `analyze cache`, one file a family: each says of every access whether it hits, at many capacities."""
