"""One file a command, named as the command; each is callable from Python."""
