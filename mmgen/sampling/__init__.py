"""Drawing images from a model: the plan, the samplers, the files that are written."""
