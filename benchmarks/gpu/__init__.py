"""All that is measured on a GPU; `benchmarks/gpu.sh` runs it."""
