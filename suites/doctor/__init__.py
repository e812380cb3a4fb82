"""`aerie doctor cluster=NAME`: what would go wrong with runs on a cluster, said before it does."""
