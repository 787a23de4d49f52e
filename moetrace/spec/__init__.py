"""What a trace runs on: models, systems and policies as TOML."""
