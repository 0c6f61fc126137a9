"""One file a command, named as the command, with its `options` and what is done with them, `execute`.

compare_variants, comparisons, compare_methods   what `compare` does, of trainings and of methods
sessions, page                                   what `playground` computes, and its page
console                                          what several commands print alike
parsing                                          how options are read, and told in help
"""

from adaptvit.extras import needed

with needed("a command"):
    import jsonargparse as jsonargparse
