"""Score S-v1: how well and how calmly a run trained, over seeds and learning rates. Pure.

    constants      the judgement in it
    run            q = A * B * C * P of one run
    spikes         lasting jumps of a training loss, counted for B
    configuration  Q over seeds and the margin over learning rates: S, 0 to 100
    chance         what luck alone could do: bounds and the exact test between two configurations

Every formula is written out in `stability_search/README.md`. None, NaN and infinite losses may be
handed in everywhere; what comes out is finite.
"""
