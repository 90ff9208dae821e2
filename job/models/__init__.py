"""The two networks, pretrained weights, and model files."""
