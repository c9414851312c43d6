"""What has nothing to do with networks: checks of arguments, memory, seeds."""
