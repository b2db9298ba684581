"""Weight transformations: pytree to pytree."""
