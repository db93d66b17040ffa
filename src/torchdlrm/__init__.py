"""torchdlrm: a complete Deep Learning Recommendation Model system on TorchRec."""

__version__ = "0.1.0"
