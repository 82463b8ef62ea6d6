"""Checkpoints that are whole or not there, and a resume that refuses what has changed since.

durable     on the disk, not only in its cache
manifest    every file of a checkpoint with its size and SHA-256
write       beside, manifest last, renamed into place
resume      the newest checkpoint that is as it was saved
ranks       what several processes do once for each storage
    trainer     `SafeCheckpointsMixin`, which has a `Trainer` save and resume so
trainer     `SafeCheckpointsMixin`, which has a `Trainer` save and resume so
"""
