"""From a run's configuration to its processes: planned purely, started, watched, and stopped by pid."""
