"""Training recipes, shard streaming and the command line."""
