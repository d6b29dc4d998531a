"""Fast ways to the same numbers as :mod:`monoloss_plugin.functional`."""
