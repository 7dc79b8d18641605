"""One file a stage: run(cfg, compose_run) reads like the contents page of what the recipe does."""
