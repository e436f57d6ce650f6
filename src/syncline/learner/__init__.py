"""The learner: one loop over rollout groups, and the mathematics of a step."""
