"""Formats of logs, a file each; `torchdlrm.logs.find` lists them."""
