"""Measurements behind `cacr bench`: kernels beside their peers, training cost, numerics, and pictures of the results.

    machine, results   what a measurement ran on; CSV files that are only appended to
    shapes, work       what is measured; operations, bytes and the floor they imply
    ceilings           what the machine can do at best, measured first
    contenders         ours and the peers, on the same inputs
    timing, measure    one contender: checked against float64, then timed
    worker, pool       measurements run in processes of their own, so that a crash or an exhausted memory is a result
    plots, summary     from the results alone

It lives in the installed package so that `cacr bench` works from a wheel too; `benchmarks/` in the repository holds
only results.
"""
