"""The preprocessing job: its plan, its tasks, and the work folder that lets it go on after a kill."""
