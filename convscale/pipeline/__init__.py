"""The whole way: images, a device and a speed become a shipped, explained network."""
