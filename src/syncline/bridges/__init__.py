"""Weight bridges: each keeps the engine on the learner's policy, and proves it with a receipt."""
