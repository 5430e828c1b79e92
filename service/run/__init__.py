"""Compose read, infer, learn and write: request → plan → run → result.

    request     what a caller requested, independent of HTTP
    plan        checks it against its files and its model, before the run
    execute     runs the plan: raster (pixels, patches), points, fields, series, similar
    passes      what a run does with each window: read, infer, convert to arrays
    executors   computes the windows of a pass: threads here, `cluster` and `worker` on Dask
    collect     keeps the arrays of each window, in order: files, sums, summary
    memory      the memory that a run reserves before it reads

Other operations: measured (series of places), teach (own classes), derive (another map from a
finished one), validate (errors and an estimate, without a run).
"""
