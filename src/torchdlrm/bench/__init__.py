"""Measures hot paths for `dlrm bench`, compared with what users have today and with their physical floor."""
