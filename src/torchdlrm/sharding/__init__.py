"""Where each table goes: TorchRec's planner, told the truth about the machine."""
