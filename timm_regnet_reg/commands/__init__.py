"""The commands, a file each: a docstring, which is the help text, `add_arguments(parser)` and `main(args)`."""

COMMANDS = 'quickstart classify package publish export run cifar reproduce table bench similarity'.split()
