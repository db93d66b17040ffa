"""The DLRM, which knows neither ranks nor files."""
