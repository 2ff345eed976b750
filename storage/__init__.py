"""Where results live: a content-addressed store of immutable artifacts.

Read in this order:

- `digests.py`   canonical JSON, SHA-256, records that carry their own checksum
- `files.py`     the seam under the store: read, list, create-if-absent, replace, delete; folder or fsspec
- `tensors.py`   tensors as bytes: the safetensors layout, one tensor or a few small ones to a blob
- `artifacts.py` the manifest of an artifact; writing one and reading one, block by block
- `store.py`     `Store`: blobs, manifests, actions (key -> artifact), refs, runs
- `inspect.py`   verify, du, ls
- `export.py`    an artifact as a plain Hugging Face folder

Nothing here knows of Prefect, model classes or recipes.
"""
