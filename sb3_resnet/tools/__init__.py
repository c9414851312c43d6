"""What stands behind the ``sb3-resnet`` command, one module a subcommand."""
