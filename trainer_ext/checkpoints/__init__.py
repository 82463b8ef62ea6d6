"""Checkpoints that are whole or not there, a resume that refuses what has changed since, and no way in.

durable       on the disk, not only in its cache
manifest      every file of a checkpoint with its size and SHA-256
write         beside, manifest last, renamed into place
background    the end of a save beside the training
resume        the newest checkpoint that is as it was saved
ranks         what several processes do once for each storage
exact         `ExactResumeMixin`: what else a run goes on exactly by, and evaluations that leave it alone
trainer       `SafeCheckpointsMixin`, which has a `Trainer` save and resume so
run_record    what saved a checkpoint, held against what goes on from it
elastic       `ElasticResumeMixin`: a run goes on from a checkpoint of another engine
into_engine   whole weights and moments go into a live engine
inert         a pickle is parsed, and nothing of it runs
allowed       what the pickles of a checkpoint may name
trusted       no checkpoint is loaded before all its pickles were parsed so
parts         the files that an index of weights names
resumed       the same, with one answer on all ranks
weights       the weights of any engine's checkpoint, by name
moments       the optimizer's state of any engine's checkpoint, by name
zero_weights  both in the flat partitions of DeepSpeed's ZeRO
description   configuration and tokenizer beside the weights
export        a checkpoint becomes a folder for `from_pretrained`
"""
