"""What a network is made of: operators, kernels, bytes."""
