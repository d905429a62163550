"""What every room stands on: types, digests, atomic files, the store, progress, provenance."""
