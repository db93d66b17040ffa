"""The folder that predicts: its format, its files, and the model as served."""
