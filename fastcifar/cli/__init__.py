"""The command line: `fastcifar` and its subcommands."""
