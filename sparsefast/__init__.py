"""Train neural networks sparse from the first step, with fastai and PyTorch"""
__version__ = "0.1.0"
