"""Speed and memory of the full-size networks: one module per paper, run by `python -m tests.bench` (make bench).

A paper's module has ITEMS, {name: function(options, rt) -> dict of plain values}, each run in a process of its own so
that its peak memory is its own, and report(results) -> lines of text.
"""
