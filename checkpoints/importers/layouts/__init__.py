"""One file per source layout, side by side with the modules of :mod:`zoo.nn`; found by their place here."""
