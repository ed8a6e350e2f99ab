"""What a model is: families of denoisers, their specs, and published settings."""
