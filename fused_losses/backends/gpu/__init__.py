"""What Triton and CUDA share: devices, library products, tiles."""
