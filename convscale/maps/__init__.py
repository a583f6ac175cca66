"""What a network looks at: class activation maps, and how far they can be believed."""
