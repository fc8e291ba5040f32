"""What the experiments of the papers have in common: the three locks, the paper's attack beside a whole sweep, and verdicts on claims."""
