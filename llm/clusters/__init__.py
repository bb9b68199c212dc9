"""From one host to many: where this is (PBS, Slurm, an MPI, or nothing), and how a job of them is started."""
