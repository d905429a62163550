"""hydra/launcher=eaft_slurm: a multirun's points as jobs of Slurm, waited for truthfully."""
