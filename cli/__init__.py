"""The command line: one file per command. A command parses, prints the plan, runs it and prints the next command."""
