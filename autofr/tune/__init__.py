"""Many searches from one file of jobs, each in a process of its own."""
