"""The same tiles in several formats, each with the reader that its users would take.

A module per reader, loaded by name so that a library that is not installed concerns nobody else. Each has

    write(source, folder)              the tiles of the shard set in `source`, once, in this format into `folder`
    passes(folder, rank, world)        opens the format and returns a function of which every call is one pass: an iterator
                                       of (fields, mask) tensors, of one tile or of a batch of them, that holds each tile of
                                       `rank`'s share among `world` consumers exactly once

Opening, workers and all, happens once; passes are what is timed. Workers stay alive between passes where the library can do
that. Every reader hands out tensors in memory of their own: what is lazily mapped is copied by the reader, not the consumer.
"""
