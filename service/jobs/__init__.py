"""Durable background jobs: killing the process loses none.

store            rows: accept, take, finish, dismiss, expire; quotas of a caller's jobs
database, schema SQLite or PostgreSQL, tables and their upgrades
runner           worker threads that run jobs
window_journal   finished windows of a running job
storage, s3      files of jobs: a folder or a bucket; `files` syncs and moves them
serialise        requests and results as JSON
heads            the callers' own models
callbacks        signed requests to subscribers, from the rows in `outbox`
backup           `python -m service backup` and `restore`
shared           files of a job for the workers of a cluster
"""
