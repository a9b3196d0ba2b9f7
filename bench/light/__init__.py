"""The parts of `bench/first_light.py`, what the first minutes on a GPU are spent on.

items      the one table of op families, shapes, dtypes and variants, and their inputs
compare    an item's results against fp64, and where they are wrong
record     what was launched: kernels, tiles, arguments, machine code
worker     runs items in a process of its own, and tells each finding at once
smoke      the smallest programs first: a copy and a product, one tile, a persistent sweep
headline   the shapes that decide, timed alone and checked
hopper     csrc/cuda, with exact answers
report     the summary
"""
