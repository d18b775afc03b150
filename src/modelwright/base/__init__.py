"""Ground floor: settings, errors, shared nouns, artifacts, devices, files, logs, progress."""
