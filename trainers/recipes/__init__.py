"""One recipe per method, at ``trainers/recipes/<family>/<method>.py``."""
