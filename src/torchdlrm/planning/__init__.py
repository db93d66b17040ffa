"""Plans for `dlrm plan`: will it fit, where does each table go, how fast."""
