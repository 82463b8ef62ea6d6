"""Callbacks for any `Trainer`, one module each."""
