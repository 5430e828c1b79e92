"""Durable background jobs: killing the process loses none.

job              a job, as callers of the store receive it
store            rows of jobs: accept, take, finish, dismiss, expire
job_requests     the stored requests; repeats by `Idempotency-Key`
result_files     results: publish, read; files derived from them
usage            what callers have used of their quotas
job_files        names, keys and folders of a job's files
state_folder     checks of `PIMC_STATE_DIR` at the start
leftovers        files without a job, which replicas and earlier services left
database, schema SQLite or PostgreSQL, tables and their upgrades
runner           worker threads that run jobs
window_journal   finished windows of a running job
storage, s3      files of jobs: a folder or a bucket; `files` syncs and moves them
serialise        requests and results as JSON
heads            the callers' own models; those in a bucket have rows (`head_rows`)
callbacks        signed requests to subscribers, from the rows in `outbox`
backup           `python -m service backup` and `restore`
shared           files of a job for the workers of a cluster
"""
