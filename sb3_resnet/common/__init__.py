"""What has nothing to do with networks: argument checks, memory, seeds."""
