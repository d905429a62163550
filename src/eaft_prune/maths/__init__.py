"""Numbers from numbers: metrics, intervals, divergences, allocation. numpy and scipy, no torch."""
