"""S4GAN Job: semi-supervised segmentation training that survives being killed."""

__version__ = "0.1.0"
