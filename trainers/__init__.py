"""How the zoo is run: phases, the trainer, parallelism, logging, recipes and the ``zoo`` command."""
