"""Pure PyTorch with bounded memory, where no compiled backend can run."""
