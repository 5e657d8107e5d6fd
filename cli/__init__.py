"""The command line: one file per command.

A command parses its arguments, prints a plan, carries it out and prints the next command.
"""
