"""Callbacks for any `Trainer`, one module each, and what some of them stand on:

    early_stopping
    ema                 train_and_eval (when to swap), shards (what each engine holds), averages_file
    gradual_unfreezing
    group_norms
    loss_spike_watch
    non_finite_guard    micro_batches (what was not finite), gradient_check, bad_step (what is said of it), drawn_rows
    run_summary         run_facts, templates/
    stop_on_signal
    throughput          flops
    time_limit

Shared: `stateful` (a state that comes back on every resume), `agreement` (one answer on all ranks), `log_entry`.
"""
