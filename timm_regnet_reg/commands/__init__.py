"""The commands, a module each: its `main(args)` runs it."""
