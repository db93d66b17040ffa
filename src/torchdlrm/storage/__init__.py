"""A path or a URL: what lies in a bucket is read and made complete as on a disk."""
