"""What `dlrm bench` measures: hot paths compared with what users have today and with their physical floor."""
