"""What `dlrm bench` measures: hot paths beside what users have today and beside their physical floor."""
