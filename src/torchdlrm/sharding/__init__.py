"""Decides where each table goes: TorchRec's planner, given the machine's real limits."""
