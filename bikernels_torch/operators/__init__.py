"""How the mode computes each of PyTorch's operators; one file for each family, each with its table."""
