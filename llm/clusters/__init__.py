"""From one host to many: the job allocation (PBS, Slurm, MPI), job scripts and launchers."""
