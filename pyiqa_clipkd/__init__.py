"""CLIP knowledge distillation for image quality: a plugin of pyiqa."""
__version__ = "0.1.0"
