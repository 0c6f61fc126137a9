"""One file a command, named as the command; each is callable from Python."""

from adaptvit.extras import needed

with needed("a command"):
    import jsonargparse as jsonargparse
