"""Raw log -> dataset: the job, resumable, in bounded memory."""
