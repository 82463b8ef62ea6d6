"""Run a GPU launch on CPU processes, with the real engines, and verify what really ran.

launch.py    the command that a person types -> the same launch, of N processes on this host
process.py   what each process runs: `on_cpu` and `watch`, then the script itself
on_cpu.py    has accelerate take gloo processes on a CPU for what they are: distributed
watch.py     caps the run, and records what it stood on and what it computed
verify.py    what was asked for, held against what the processes recorded
run.py       train and save, then resume and export; the verdict
"""
