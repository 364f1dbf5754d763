"""The second tier: committed checkpoints copied to object stores or other disks, and read back from there.

- `config` says what a mirror is, `plan` which objects a checkpoint becomes, as plain data.
- `store` is the seam to a store: `object_store` over obstore (S3, GCS, Azure), `file_store` over a directory.
- `upload` puts one checkpoint: data first, the manifest last; `process` runs it outside of the training's process;
  `state` is what survives a crash; `worker` does one after another; `context` is what all uploads to a mirror share.
- `remote` shows a store to the reading side as if it were a file system that can only be read.

Guarantees:
- A manifest in a store names only objects that were found whole before it was put, and it is put atomically.
- What was reported as mirrored can be read back until retention of this package deletes it, manifest first.
- Local checkpoints are only read. Nothing of a library is imported before a mirror of its kind is used.
"""
