"""The command `fastcifar` and its subcommands."""
