"""What our records say of the paper's claims: quantities with intervals, by group of settings."""
