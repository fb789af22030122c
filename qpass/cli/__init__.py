"""The `qpass` command: one file for each subcommand."""
