"""Long jobs: cut into tasks, run by threads or a cluster, resumed after any interruption."""
