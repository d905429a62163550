"""Checks of what is there: checkpoints, experts, disks, servers, and what dead runs left."""
