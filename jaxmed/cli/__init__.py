"""The command line: each command is a frozen dataclass plus a few lines of glue."""
