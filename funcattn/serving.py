"""Continuous batching: texts that come and go, decoded side by side, each as it would be alone."""

from .decoding.batching import Served, Slot, Slots, enter, idle, leave, step

__all__ = ["Served", "Slot", "Slots", "enter", "idle", "leave", "step"]
