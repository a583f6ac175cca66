"""Detection: boxes in pictures, on torchvision's detection: data, training, evaluation."""
