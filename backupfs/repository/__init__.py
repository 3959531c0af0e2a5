"""The repository: immutable layer files and manifests, and an index derived from them. Synchronous; any thread."""
