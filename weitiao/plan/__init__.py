"""What a run will need, before anything is loaded: memory, disk and time of every phase.

from weitiao.plan import phases, report
"""
