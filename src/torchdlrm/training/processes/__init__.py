"""The processes of a training: where each computes, how they start, agree, find each other, fail and end."""
