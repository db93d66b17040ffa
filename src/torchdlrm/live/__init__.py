"""The model that lives: each new log is scored, learnt from and published, period after period."""
