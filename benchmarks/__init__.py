"""Speed, as ratios within one run: `make bench` writes the table under results/."""
