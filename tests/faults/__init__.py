"""Faults on purpose: kills, signals, full disks, other surroundings, and how runs then end."""
