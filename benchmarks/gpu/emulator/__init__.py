"""Run what Triton compiles for NVIDIA's GPUs without one; see README.md."""
