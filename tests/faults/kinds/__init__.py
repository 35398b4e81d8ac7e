"""The faults, by what they break. Importing this registers them all."""

from tests.faults.kinds import adapters, clocks, disk, hostile, network, processes, redis, rolling

__all__ = ["adapters", "clocks", "disk", "hostile", "network", "processes", "redis", "rolling"]
