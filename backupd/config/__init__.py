"""The configuration: loads TOML into immutable models, and reports all problems at once with their keys."""
