"""vLLM as the engine: the only folder that imports vLLM."""
