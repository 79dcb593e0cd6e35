"""Buckets as WORKDIR, as outputs and as inputs: gs://, s3://, and hf:// to read from.

    addresses.py  gs://BUCKET/KEY, and where its copy on this machine is: the shadow
    buckets.py    what a bucket is asked for, and what its refusals mean
    shadow.py     pull a folder's files before they are read, push them back when they changed
    lease.py      one run at a time in a folder of a bucket

The rest of dpo_jax works in the shadow as in any folder. Checkpoints alone go to gs:// directly.
"""
