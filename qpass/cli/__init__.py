"""The `qpass` command: one file for each subcommand, which imports torch only when it runs."""
