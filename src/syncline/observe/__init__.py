"""What a run tells people: metrics, rollout samples, live progress, logs, and the report at the end."""
