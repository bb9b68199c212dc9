"""Where the run is: in a job of PBS or Slurm, or in none."""
