"""The words of the `dinocomp` command, one a file: `TEXT` says what it does, `add` its arguments, `run` does it."""
